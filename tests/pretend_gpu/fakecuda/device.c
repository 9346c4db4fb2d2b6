// FAKECUDA_DEVICES cards of one kind, H100 (FAKECUDA_SM=90, the default) or A100 (80), and the driver's entry points.
#include "fakecuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static __thread int current;

int sm(void) { return setting("FAKECUDA_SM", 90); }
int device_count(void) { return setting("FAKECUDA_DEVICES", 1); }
int current_device(void) { return current; }

static cudaError_t choose(int device) {
    if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
    current = device;
    return OK;
}

static int attribute(int which) {
    int a100 = sm() == 80;
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor: return sm() / 10;
        case cudaDevAttrComputeCapabilityMinor: return sm() % 10;
        case cudaDevAttrMultiProcessorCount: return a100 ? 108 : 132;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrMaxRegistersPerMultiprocessor:
        case cudaDevAttrMaxRegistersPerBlock: return 65536;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return a100 ? 166912 : 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return a100 ? 167936 : 233472;
        case cudaDevAttrL2CacheSize: return a100 ? 41943040 : 52428800;
        case cudaDevAttrClockRate: return a100 ? 1410000 : 1980000;
        case cudaDevAttrMemoryClockRate: return a100 ? 1593000 : 2619000;
        case cudaDevAttrGlobalMemoryBusWidth: return 5120;
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrUnifiedAddressing: return 1;
    }
    return 0;
}

// FAKECUDA_DRIVER: the CUDA that the driver is for, as 11040 for 11.4. An older one than the runtime's does nothing for it.
static const int runtime = 13000;
static int driver(void) { return setting("FAKECUDA_DRIVER", runtime); }
cudaError_t cudaGetDeviceCount(int* count) {
    *count = driver() < runtime ? 0 : device_count();
    return driver() < runtime ? fail(cudaErrorInsufficientDriver) : OK;
}
cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return OK;
}
cudaError_t cudaSetDevice(int device) { return choose(device); }
cudaError_t cudaInitDevice(int device, unsigned flags, unsigned more) { return OK; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver();
    return OK;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = runtime;
    return OK;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return OK;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int room, int device) {
    snprintf(id, room, "0000:%02x:00.0", device);
    return OK;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
    *can = 0;
    return OK;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, sm() == 80 ? "NVIDIA A100 (pretend)" : "NVIDIA H100 (pretend)");
    p->totalGlobalMem = (size_t)setting("FAKECUDA_MEMORY", 80) << 30;
    p->major = sm() / 10;
    p->minor = sm() % 10;
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->reservedSharedMemPerBlock = 1024;
    p->totalConstMem = 65536;
    p->textureAlignment = 512;
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = 5120;
    p->asyncEngineCount = 3;
    p->clusterLaunch = sm() >= 90;
    p->pciBusID = device;
    p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = p->cooperativeLaunch = 1;
    p->canMapHostMemory = p->managedMemory = p->hostRegisterSupported = p->memoryPoolsSupported = 1;
    return OK;
}

cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t error = unsafe("cudaDeviceSynchronize");
    if (error) return error;
    if (invalidate_captures_of(current)) {  // relaxed or not: a capture is no work that one could wait for
        say("X cudaDeviceSynchronize of a device that is capturing");
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    say("S cudaDeviceSynchronize device=%d", current);
    return OK;
}

// ---- driver: contexts are device numbers plus one
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int* version) { return cudaDriverGetVersion(version); }
CUresult cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count); }
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal < device_count() ? 0 : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
    *value = attribute(which);
    return 0;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = (CUcontext)(size_t)(current + 1);
    return 0;
}
CUresult cuCtxSetCurrent(CUcontext context) { return context ? choose((int)(size_t)context - 1) : 0; }
CUresult cuCtxGetDevice(CUdevice* device) {
    *device = current;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = (CUcontext)(size_t)(device + 1);
    return 0;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return 0;
}

// ---- looking functions up by name finds ours, or one that does nothing
static int nothing(void) { return 0; }
static void* named(const char* name) {
    void* found = dlsym(RTLD_DEFAULT, name);
    return found ? found : (void*)nothing;
}
#undef cuGetProcAddress
CUresult cuGetProcAddress(const char* name, void** f, int v, cuuint64_t flags, CUdriverProcAddressQueryResult* status) {
    *f = named(name);
    return 0;
}
CUresult cuGetProcAddress_v2(const char* name, void** f, int v, cuuint64_t flags, CUdriverProcAddressQueryResult* status) {
    *f = named(name);
    if (status) *status = 0;
    return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** f, unsigned v, unsigned long long flags, enum cudaDriverEntryPointQueryResult* status) {
    *f = named(name);
    if (status) *status = 0;
    return OK;
}
