// libcuda.so.1 of a machine without a GPU: what Triton and torch ask of the driver itself.
#include <dlfcn.h>
#include <string.h>

#define OK(name) \
    int name() { return 0; }
#define GIVE(name, type, value) \
    int name(type* made) {      \
        *made = (type)(value);  \
        return 0;               \
    }
#define A_HANDLE ((void*)0x5000)

__attribute__((weak)) void gpu_stub_launched(void);  // the runtime's, where it is preloaded

static int launched(void) {
    if (gpu_stub_launched) gpu_stub_launched();
    return 0;
}

OK(cuInit)
OK(cuModuleUnload)
OK(cuLibraryUnload)
OK(cuFuncSetCacheConfig)
OK(cuFuncSetAttribute)
OK(cuCtxSynchronize)
OK(cuStreamSynchronize)
OK(cuDevicePrimaryCtxRelease)
OK(cuCtxPushCurrent_v2)
OK(cuCtxSetCurrent)
OK(cuCtxSetLimit)
OK(cuTensorMapEncodeTiled)
OK(cuTensorMapEncodeIm2col)
OK(cuPointerGetAttributes)

GIVE(cuDriverGetVersion, int, 13020)
GIVE(cuDeviceGetCount, int, 1)
GIVE(cuCtxGetDevice, int, 0)
GIVE(cuCtxGetCurrent, void*, A_HANDLE)
GIVE(cuDevicePrimaryCtxRetain, void*, A_HANDLE)
GIVE(cuModuleLoadData, void*, A_HANDLE)
GIVE(cuModuleLoadDataEx, void*, A_HANDLE)
GIVE(cuModuleLoad, void*, A_HANDLE)
GIVE(cuModuleGetFunction, void*, A_HANDLE)
GIVE(cuLibraryLoadData, void*, A_HANDLE)
GIVE(cuLibraryGetModule, void*, A_HANDLE)
GIVE(cuLibraryGetKernel, void*, A_HANDLE)
GIVE(cuKernelGetFunction, void*, A_HANDLE)
GIVE(cuFuncGetModule, void*, A_HANDLE)
GIVE(cuCtxGetLimit, unsigned long, 1024)
GIVE(cuOccupancyMaxActiveClusters, int, 1)
GIVE(cuOccupancyMaxActiveBlocksPerMultiprocessor, int, 2)

int cuLaunchKernel() { return launched(); }
int cuLaunchKernelEx() { return launched(); }
int cuLaunchCooperativeKernel() { return launched(); }

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* is_active) {
    *flags = 0, *is_active = 1;
    return 0;
}

int cuCtxPopCurrent_v2(void** context) {
    if (context) *context = A_HANDLE;
    return 0;
}

int cuDeviceGet(int* device, int number) {
    *device = number;
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {  // CUdevice_attribute
        case 8: *value = 49152; break;     // shared memory of a block
        case 10: *value = 32; break;       // threads of a warp
        case 12: *value = 65536; break;    // registers of a block
        case 13: *value = 1980000; break;  // clock, kHz
        case 16: *value = 132; break;      // multiprocessors
        case 36: *value = 2619000; break;  // memory clock, kHz
        case 37: *value = 5120; break;     // memory bus, bits
        case 39: *value = 2048; break;     // threads of a multiprocessor
        case 75: *value = 9; break;        // capability, major
        case 76: *value = 0; break;        // and minor
        case 97: *value = 232448; break;   // shared memory that a block may ask for
        default: *value = 1024;
    }
    return 0;
}

int cuModuleGetGlobal_v2(void** pointer, unsigned long* size, void* module, const char* name) {
    *pointer = A_HANDLE;
    return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // threads of a block, registers
    return 0;
}

int cuPointerGetAttribute(void* value, int attribute, unsigned long pointer) {
    if (attribute == 3)  // the device's pointer
        *(unsigned long*)value = pointer;
    else  // memory type: device
        *(int*)value = 2;
    return 0;
}

int cuStreamGetCtx(void* stream, void** context) {
    *context = A_HANDLE;
    return 0;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return 0;
}

int cuStreamIsCapturing(void* stream, int* is_capturing) {
    *is_capturing = 0;
    return 0;
}

int cuGetErrorName(int error, const char** name) {
    *name = "an error of the pretended driver";
    return 0;
}

int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long flags,
                        void* status) {
    *function = dlsym(RTLD_DEFAULT, name);
    return *function ? 0 : 500;  // not found
}
