// A CUDA runtime without a GPU: every call succeeds, no kernel computes, nothing is copied.
//
// Preloaded under torch it lets torch's own CUDA code run: dispatch, autograd's threads, caching
// allocators, streams, events. Device memory is address space without access, so that a host that
// reads it crashes, as it would beside a real GPU. Whatever is read back from the device is zero.
//
// The machine: GPU_STUB_DEVICES (1), GPU_STUB_GIB (80), GPU_STUB_CAPABILITY (90),
// GPU_STUB_NAME ("pretended GPU").
#include "stub.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime_api.h"

#define GPU_STUB_DEFINE(name) std::atomic<long> name{0};
namespace counted {
GPU_STUB_COUNTERS(GPU_STUB_DEFINE)
}

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex mutex;

// ---- the machine

const char* from_environment(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value ? value : otherwise;
}

int num_devices() {
    int number = atoi(from_environment("GPU_STUB_DEVICES", "1"));
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return number;
    if (!*visible || !strcmp(visible, "-1")) return 0;
    int named = 1;
    for (const char* letter = visible; *letter; letter++) named += *letter == ',';
    return named < number ? named : number;
}

size_t capacity() { return atof(from_environment("GPU_STUB_GIB", "80")) * (1ull << 30); }
int capability() { return atoi(from_environment("GPU_STUB_CAPABILITY", "90")); }

thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) { return last_error = error; }

// ---- who watches

using Callback = void (*)(const char* what, long num_bytes);
std::atomic<Callback> callback{nullptr};

// ---- memory: base address -> size and device

struct Block {
    size_t size;
    int device;
};
using Blocks = std::map<uintptr_t, Block>;
Blocks on_device, pinned;
size_t used[64];

Blocks::iterator block_of(Blocks& blocks, const void* pointer) {
    auto after = blocks.upper_bound((uintptr_t)pointer);
    if (after == blocks.begin()) return blocks.end();
    --after;
    return (uintptr_t)pointer < after->first + after->second.size ? after : blocks.end();
}

bool is_in(Blocks& blocks, const void* pointer) {
    Lock lock(mutex);
    return block_of(blocks, pointer) != blocks.end();
}

void* mapped(size_t size, int protection) {
    void* made = mmap(nullptr, size ? size : 1, protection,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return made == MAP_FAILED ? nullptr : made;
}

// ---- copies from pinned memory that may still be on their way
//
// A copy counts as done once the host has seen so: by waiting for its stream, or for an event
// recorded after it, or by asking such an event. What a stream waits for is done before it. So a
// clock says of each stream how many of its copies are done at some moment.

using Clock = std::map<uintptr_t, long>;
struct Event {
    Clock clock;
    long recorded;  // by the host's own time
};
std::map<uintptr_t, Clock> streams;
std::map<uintptr_t, Event> events;

// The device is behind the host by as many launches as its queue holds. Questions count too, so
// that who only asks gets an answer.
const long QUEUED = 1024;
std::atomic<long> questions{0}, caught_up{0};

long now() { return counted::launches + questions; }

// The host has waited until the device was where the host had been by then.
void catch_up(long then) {
    if (caught_up < then) caught_up = then;
}

struct Copy {
    size_t size;
    uintptr_t stream;
    long number;
    uint64_t sum;
};
std::map<uintptr_t, Copy> on_the_way;  // by where it is read

void join(Clock& clock, const Clock& other) {
    for (auto& [stream, number] : other)
        if (clock[stream] < number) clock[stream] = number;
}

uint64_t sum_of(uintptr_t from, size_t size) {
    uint64_t sum = 1469598103934665603ull, word = 0;
    for (size_t place = 0; place < size; place += 8) {
        memcpy(&word, (const char*)from + place, size - place < 8 ? size - place : 8);
        sum = (sum ^ word) * 1099511628211ull;
    }
    return sum;
}

bool is_overwritten(std::map<uintptr_t, Copy>::iterator copy) {
    return sum_of(copy->first, copy->second.size) != copy->second.sum;
}

long sent(uintptr_t from, size_t size, uintptr_t stream) {
    long overwritten = 0;
    Lock lock(mutex);
    for (auto copy = on_the_way.begin(); copy != on_the_way.end();) {
        bool overlaps = copy->first < from + size && from < copy->first + copy->second.size;
        if (overlaps && is_overwritten(copy)) overwritten += copy->second.size;
        copy = overlaps ? on_the_way.erase(copy) : std::next(copy);
    }
    on_the_way[from] = {size, stream, ++streams[stream][stream], sum_of(from, size)};
    return overwritten;
}

void is_done(const Clock& clock) {
    long overwritten = 0;
    {
        Lock lock(mutex);
        for (auto copy = on_the_way.begin(); copy != on_the_way.end();) {
            auto known = clock.find(copy->second.stream);
            bool done = known != clock.end() && copy->second.number <= known->second;
            if (done && is_overwritten(copy)) overwritten += copy->second.size;
            copy = done ? on_the_way.erase(copy) : std::next(copy);
        }
    }
    if (overwritten) stub::tell("pinned memory overwritten while it is copied", overwritten);
}

Clock clock_of(cudaStream_t stream) {
    Lock lock(mutex);
    return streams[(uintptr_t)stream];
}

Event found(cudaEvent_t event) {
    Lock lock(mutex);
    return events[(uintptr_t)event];
}

Clock everything() {
    Clock clock;
    Lock lock(mutex);
    for (auto& [stream, own] : streams) join(clock, own);
    return clock;
}

void copied(void* to, const void* from, size_t size, cudaStream_t stream) {
    bool to_device = is_in(on_device, to), from_device = is_in(on_device, from);
    if (to_device && from_device) {
        counted::copies_on_device++, counted::bytes_on_device += size;
    } else if (to_device) {
        counted::copies_to_device++, counted::bytes_to_device += size;
        if (!is_in(pinned, from)) {
            counted::pageable_copies++;
            stub::tell("copy from pageable memory", size);
        } else if (callback && size) {
            long overwritten = sent((uintptr_t)from, size, (uintptr_t)stream);
            if (overwritten)
                stub::tell("pinned memory overwritten while it is copied", overwritten);
        }
    } else {
        if (from_device) {
            counted::copies_to_host++, counted::bytes_to_host += size;
            if (!is_in(pinned, to)) {
                counted::pageable_copies++;
                stub::tell("copy to pageable memory", size);
            }
            memset(to, 0, size);
        } else {
            memmove(to, from, size);
        }
    }
}

// ---- kernels

std::unordered_map<const void*, std::string> kernel_names;
std::unordered_map<std::string, long> launched;
std::atomic<bool> counts_names{false};

cudaError_t launch(const void* function) {
    counted::launches++;
    if (counts_names) {
        Lock lock(mutex);
        auto found = kernel_names.find(function);
        launched[found == kernel_names.end() ? "?" : found->second]++;
    }
    return cudaSuccess;
}

template <class Handle>
cudaError_t made(Handle* handle) {
    static std::atomic<uintptr_t> next{0x1000};
    *handle = (Handle)(next += 16);
    return cudaSuccess;
}

}  // namespace

void stub::tell(const char* what, long num_bytes) {
    if (Callback told = callback) told(what, num_bytes);
}

void stub::waited(const char* what) {
    counted::waits++;
    tell(what, 0);
}

int stub::current_device() { return device; }

extern "C" {

// ---- what the watch asks

void gpu_stub_watch(Callback function) { callback = function; }

long gpu_stub_count(const char* name) {
#define GPU_STUB_GIVE(counter) \
    if (!strcmp(name, #counter)) return counted::counter;
    GPU_STUB_COUNTERS(GPU_STUB_GIVE)
    return -1;
}

void gpu_stub_launched() { counted::launches++; }  // by the driver: Triton's kernels

void gpu_stub_count_names(int on) {
    Lock lock(mutex);
    launched.clear();
    counts_names = on;
}

void gpu_stub_write_names(const char* path) {
    Lock lock(mutex);
    FILE* file = fopen(path, "w");
    for (auto& [name, number] : launched) fprintf(file, "%ld\t%s\n", number, name.c_str());
    fclose(file);
}

// ---- devices

cudaError_t cudaGetDeviceCount(int* number) {
    *number = num_devices();
    return *number ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int* which) {
    *which = device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int which) {
    if (which < 0 || which >= num_devices()) return failed(cudaErrorInvalidDevice);
    device = which;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int which) {
    memset(found, 0, sizeof *found);
    snprintf(found->name, 256, "%s", from_environment("GPU_STUB_NAME", "pretended GPU"));
    found->totalGlobalMem = capacity();
    found->major = capability() / 10, found->minor = capability() % 10;
    found->multiProcessorCount = 132, found->warpSize = 32;
    found->maxThreadsPerBlock = 1024, found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = 232448;
    found->sharedMemPerMultiprocessor = 233472;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 50 << 20, found->memoryBusWidth = 5120, found->textureAlignment = 512;
    found->concurrentKernels = found->unifiedAddressing = found->cooperativeLaunch = 1;
    found->pciBusID = which;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    static const std::map<int, int> values = {
        {cudaDevAttrMultiProcessorCount, 132},
        {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
        {cudaDevAttrMaxGridDimX, 2147483647},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    };
    auto found = values.find(which);
    *value = which == cudaDevAttrComputeCapabilityMajor   ? capability() / 10
             : which == cudaDevAttrComputeCapabilityMinor ? capability() % 10
             : found != values.end()                      ? found->second
                                                          : 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int which) {
    snprintf(text, size, "0000:%02x:00.0", which);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    stub::waited("cudaDeviceSynchronize");
    catch_up(now());
    is_done(everything());
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorPretended";
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        default: return "an error of the pretended GPU";
    }
}

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

static int any_driver_function() { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = (void*)any_driver_function;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- memory

cudaError_t cudaMalloc(void** pointer, size_t size) {
    Lock lock(mutex);
    if (used[device] + size > capacity()) return failed(cudaErrorMemoryAllocation);
    void* block = mapped(size, PROT_NONE);
    if (!block) return failed(cudaErrorMemoryAllocation);
    madvise(block, size, MADV_DONTFORK);
    used[device] += size;
    on_device[(uintptr_t)block] = {size, device};
    counted::device_allocations++;
    *pointer = block;
    return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
    if (!pointer) return cudaSuccess;
    {
        Lock lock(mutex);
        auto block = on_device.find((uintptr_t)pointer);
        if (block == on_device.end()) return failed(cudaErrorInvalidValue);
        used[block->second.device] -= block->second.size;
        munmap(pointer, block->second.size);
        on_device.erase(block);
    }
    stub::waited("cudaFree");
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) {
    return cudaMalloc(pointer, size);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    Lock lock(mutex);
    *total = capacity(), *free = capacity() - used[device];
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
    void* block = mapped(size, PROT_READ | PROT_WRITE);
    if (!block) return failed(cudaErrorMemoryAllocation);
    Lock lock(mutex);
    pinned[(uintptr_t)block] = {size, device};
    counted::pinned_allocations++, counted::bytes_pinned += size;
    *pointer = block;
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void** pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

cudaError_t cudaFreeHost(void* pointer) {
    Lock lock(mutex);
    auto block = pinned.find((uintptr_t)pointer);
    if (block == pinned.end()) return cudaSuccess;
    uintptr_t end = block->first + block->second.size;
    on_the_way.erase(on_the_way.lower_bound(block->first), on_the_way.lower_bound(end));
    munmap(pointer, block->second.size);
    pinned.erase(block);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
    Lock lock(mutex);
    pinned[(uintptr_t)pointer] = {size, device};
    counted::pinned_allocations++, counted::bytes_pinned += size;
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
    Lock lock(mutex);
    pinned.erase((uintptr_t)pointer);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
    Lock lock(mutex);
    memset(found, 0, sizeof *found);
    auto block = block_of(on_device, pointer);
    if (block != on_device.end()) {
        found->type = cudaMemoryTypeDevice, found->device = block->second.device;
        found->devicePointer = (void*)pointer;
    } else if (block_of(pinned, pointer) != pinned.end()) {
        found->type = cudaMemoryTypeHost;
        found->hostPointer = found->devicePointer = (void*)pointer;
    } else {
        found->type = cudaMemoryTypeUnregistered;
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
    copied(to, from, size, stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    copied(to, from, size, nullptr);
    stub::waited("cudaMemcpy");
    is_done(clock_of(nullptr));
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                cudaStream_t stream) {
    copied(to, from, size, stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        copied((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) {
    counted::memsets++;
    return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t size) {
    return cudaMemsetAsync(pointer, value, size, nullptr);
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return made(pool); }

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    *(long*)value = 0;
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
    static char area[1 << 16];
    *pointer = area;
    return cudaSuccess;
}

// ---- streams and events

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return made(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return made(stream); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    return made(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    is_done(clock_of(stream));
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    stub::waited("cudaStreamSynchronize");
    catch_up(now());
    is_done(clock_of(stream));
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Lock lock(mutex);
    join(streams[(uintptr_t)stream], events[(uintptr_t)event].clock);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
    function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data,
                                  unsigned) {
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return made(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return made(event); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Lock lock(mutex);
    events.erase((uintptr_t)event);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    Lock lock(mutex);
    events[(uintptr_t)event] = {streams[(uintptr_t)stream], now()};
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    questions++;
    Event asked = found(event);
    bool behind = asked.recorded > caught_up && now() - asked.recorded < QUEUED;
    if (behind) return cudaErrorNotReady;
    is_done(asked.clock);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    stub::waited("cudaEventSynchronize");
    catch_up(found(event).recorded);
    is_done(found(event).clock);
    return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- kernels, as nvcc's host code registers and launches them

void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
    Lock lock(mutex);
    kernel_names[function] = name;
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

static thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    *(void**)stream = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launch((const void*)kernel);
}

cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) {
    return launch(function);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) {
    return launch(function);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, size_t,
                                        cudaStream_t) {
    return launch(function);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024, found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = capability();
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* number, const void*, int, size_t) {
    *number = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* number, const void*, int,
                                                                   size_t, unsigned) {
    *number = 2;
    return cudaSuccess;
}

}  // extern "C"
