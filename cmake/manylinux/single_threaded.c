/* libstdc++ reads this variable of glibc 2.32 and later, to leave atomic operations out where there is one thread. This
 * is our own, for older ones: 0 means that there may be several, which is always right. */
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
