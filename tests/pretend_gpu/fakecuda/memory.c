// Memory: "device" memory is lazily mapped host memory, so allocations cost nothing until touched and copies are real copies.
#include "fakecuda.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ENTRIES = 1 << 16, DEVICES = 64 };
static const size_t CONTEXT = 512u << 20;  // what a context takes of a card before anybody asks for memory
static const size_t LARGE = 16u << 20;  // writes from device to device beyond this are not performed: nothing computes on them
static struct {
    char* start;
    size_t bytes;
    int kind, device, mapped;
} entry[ENTRIES];
static int entries;
static size_t used[DEVICES];

static int find(const void* pointer) {
    for (int i = 0; i < entries; i++)
        if (entry[i].start && (char*)pointer >= entry[i].start && (char*)pointer < entry[i].start + entry[i].bytes) return i;
    return -1;
}

static int note(char* start, size_t bytes, int kind, int mapped) {
    int i = 0;
    while (i < entries && entry[i].start) i++;
    if (i == ENTRIES) return -1;
    if (i == entries) entries++;
    entry[i].start = start;
    entry[i].bytes = bytes;
    entry[i].kind = kind;
    entry[i].device = current_device();
    entry[i].mapped = mapped;
    return i;
}

static size_t total(void) { return (size_t)setting("FAKECUDA_MEMORY", 80) << 30; }

static void* take(size_t bytes, int kind) {
    size_t whole = (bytes + 4095) & ~(size_t)4095;
    if (!whole) whole = 4096;
    void* start = NULL;
    pthread_mutex_lock(&big);
    if (kind == PINNED || CONTEXT + used[current_device()] + whole <= total()) {
        start = mmap(0, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED || note(start, whole, kind, 1) < 0) start = NULL;
        if (start && kind == DEVICE) used[current_device()] += whole;
    }
    pthread_mutex_unlock(&big);
    return start;
}

static void give_back(void* pointer) {
    pthread_mutex_lock(&big);
    int i = find(pointer);
    if (i >= 0 && pointer) {
        if (entry[i].kind == DEVICE) used[entry[i].device] -= entry[i].bytes;
        if (entry[i].mapped) munmap(entry[i].start, entry[i].bytes);
        entry[i].start = NULL;
    }
    pthread_mutex_unlock(&big);
}

int kind_of(const void* pointer, int* device) {
    pthread_mutex_lock(&big);
    int i = find(pointer), kind = i < 0 ? NOWHERE : entry[i].kind;
    if (device) *device = i < 0 ? -1 : entry[i].device;
    pthread_mutex_unlock(&big);
    return kind;
}

// ---- allocation
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    cudaError_t error = unsafe("cudaMalloc");
    if (error) return error;
    *pointer = take(bytes, DEVICE);
    say("A cudaMalloc %zu device=%d%s", bytes, current_device(), *pointer ? "" : " refused");
    return *pointer ? OK : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* pointer) {
    if (!pointer) return OK;
    cudaError_t error = unsafe("cudaFree");
    if (error) return error;
    say("F cudaFree device=%d", current_device());
    give_back(pointer);
    return OK;
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) { return cudaFree(pointer); }

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    cudaError_t error = unsafe("cudaHostAlloc");
    if (error) return error;
    *pointer = take(bytes, PINNED);
    say("H cudaHostAlloc %zu", bytes);
    return *pointer ? OK : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* pointer) {
    give_back(pointer);
    return OK;
}
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned flags) {
    pthread_mutex_lock(&big);
    note(pointer, bytes, PINNED, 0);
    pthread_mutex_unlock(&big);
    say("H cudaHostRegister %zu", bytes);
    return OK;
}
cudaError_t cudaHostUnregister(void* pointer) {
    give_back(pointer);
    return OK;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
    *device = host;
    return OK;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* all) {
    *all = total();
    *available = total() - CONTEXT - used[current_device()];
    return OK;
}
CUresult cuMemGetInfo_v2(size_t* available, size_t* all) { return cudaMemGetInfo(available, all); }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* pointer) {
    memset(a, 0, sizeof *a);
    int kind = kind_of(pointer, &a->device);
    a->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->devicePointer = (void*)pointer;
    if (kind != DEVICE) a->hostPointer = (void*)pointer;
    return OK;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr*)value = pointer;
    else
        *(int*)value = 0;
    return 0;
}

// ---- copies and fills
void perform(const Write* what) {
    int to = kind_of(what->to, NULL), from = what->from ? kind_of(what->from, NULL) : DEVICE;
    if (to == DEVICE && from == DEVICE && what->bytes > LARGE) return;
    if (what->from)
        memmove(what->to, what->from, what->bytes);
    else
        for (size_t at = 0; at + what->width <= what->bytes; at += what->width)
            memcpy((char*)what->to + at, what->pattern, what->width);
}

void write_now_or_later(Write what, Stream* stream) {
    if (!stream->capture) {
        perform(&what);
        return;
    }
    pthread_mutex_lock(&big);
    Graph* graph = stream->capture->graph;
    *graph->end = memcpy(malloc(sizeof what), &what, sizeof what);
    graph->end = &(*graph->end)->next;
    pthread_mutex_unlock(&big);
}

static cudaError_t copy(const char* what, void* to, const void* from, size_t bytes, cudaStream_t handle, int blocking) {
    int target = kind_of(to, NULL), source = kind_of(from, NULL), number = 0;
    int pageable = target == NOWHERE || source == NOWHERE;
    const char* way = target == DEVICE ? (source == DEVICE ? "D2D" : "H2D") : source == DEVICE ? "D2H" : "H2H";
    Stream* stream = stream_of(handle);
    cudaError_t error = blocking ? unsafe(what) : OK;
    if (error) return error;
    if (stream->capture && pageable) {
        stream->capture->invalid = 1;
        say("X %s %s of pageable memory during capture", what, way);
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    if ((error = enqueue(stream, &number))) return error;
    write_now_or_later((Write){.to = to, .from = from, .bytes = bytes}, stream);
    say("M %s %s%s %zu device=%d stream=%d capture=%d", what, way, pageable ? " pageable" : "", bytes, stream->device,
        stream->number, number);
    return OK;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
    return copy("cudaMemcpy", to, from, bytes, 0, 1);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy("cudaMemcpyAsync", to, from, bytes, stream, 0);
}

static cudaError_t fill(const char* what, void* to, int value, size_t bytes, cudaStream_t handle) {
    Stream* stream = stream_of(handle);
    int number = 0;
    cudaError_t error = enqueue(stream, &number);
    if (error) return error;
    write_now_or_later((Write){.to = to, .bytes = bytes, .pattern = {value}, .width = 1}, stream);
    say("M %s fill %zu device=%d stream=%d capture=%d", what, bytes, stream->device, stream->number, number);
    return OK;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return fill("cudaMemset", to, value, bytes, 0); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return fill("cudaMemsetAsync", to, value, bytes, stream);
}
