/* What newer versions of glibc have, as our own.
 *
 * libstdc++ reads this variable of glibc 2.32 and later, to leave atomic operations out where there is one thread. This
 * is our own, for older ones: 0 means that there may be several, which is always right. */
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

/* glibc 2.29 has a log that does not set errno, under a version of its own; this is the one before. */
__asm__(".symver old_log, log@GLIBC_2.2.5");
double old_log(double x);
__attribute__((visibility("hidden"))) double log(double x);
double log(double x) { return old_log(x); }
