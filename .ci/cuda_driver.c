/* A stand-in for libcuda.so.1, with which cuda_wheel.py has the CUDA backend meet drivers that this machine lacks: old
 * ones, and those of machines whose GPUs are gone. It gets no further than cuInit.
 *
 *   STUB_INIT     what cuInit returns, default 100: there is no device
 *   STUB_VERSION  the CUDA that the driver is for, default 13000
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int number(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) {
    (void)flags;
    return number("STUB_INIT", 100);
}

int cuDriverGetVersion(int* version) {
    *version = number("STUB_VERSION", 13000);
    return 0;
}

static int other(void) { return 801; /* not supported */ }

/* How the runtime finds every function, this one again among them. */
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
    (void)version;
    (void)flags;
    void* self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void* found = self ? dlsym(self, strcmp(name, "cuGetProcAddress") == 0 ? "cuGetProcAddress_v2" : name) : NULL;
    *function = found ? found : (void*)other;
    if (status) *status = 0;
    return 0;
}
