/* Stand-ins for libpthread.so.0 and libdl.so.2 as they were before glibc 2.34 moved their functions into libc.so.6.
 * Only the linker sees them: what it links then asks for the old symbols, which every later glibc still has. */
#define DEFINE(name) \
    void name(void) {}
#ifdef OCTAVO_PTHREAD
DEFINE(pthread_create)
DEFINE(pthread_join)
DEFINE(pthread_detach)
DEFINE(pthread_once)
DEFINE(pthread_mutex_trylock)
DEFINE(pthread_rwlock_rdlock)
DEFINE(pthread_rwlock_wrlock)
DEFINE(pthread_rwlock_unlock)
DEFINE(pthread_key_create)
DEFINE(__pthread_key_create)
DEFINE(pthread_key_delete)
DEFINE(pthread_getspecific)
DEFINE(pthread_setspecific)
DEFINE(pthread_setname_np)
#else
DEFINE(dlopen)
DEFINE(dlsym)
DEFINE(dlerror)
DEFINE(dlclose)
DEFINE(dladdr)
#endif
