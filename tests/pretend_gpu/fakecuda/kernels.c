// Kernels and matrix products: logged by name and shape, and not executed.
#include "fakecuda.h"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <stdlib.h>
#include <string.h>

// ---- names of kernels by their handles: open addressing, growing by doubling
static struct {
    const void* handle;
    const char* name;
} * table;
static size_t filled, room;

static size_t slot(const void* handle) {
    size_t i = ((size_t)handle * 0x9E3779B97F4A7C15ull >> 20) & (room - 1);
    while (table[i].handle && table[i].handle != handle) i = (i + 1) & (room - 1);
    return i;
}

static void name_it(const void* handle, const char* name) {
    pthread_mutex_lock(&big);
    if (2 * (filled + 1) > room) {
        typeof(table) old = table;
        size_t count = room;
        room = room ? 2 * room : 1 << 17;
        table = calloc(room, sizeof *table);
        for (size_t i = 0; i < count; i++)
            if (old[i].handle) table[slot(old[i].handle)] = old[i];
        free(old);
    }
    size_t i = slot(handle);
    filled += !table[i].handle;
    table[i].handle = handle;
    table[i].name = name;
    pthread_mutex_unlock(&big);
}

static const char* name_of(const void* handle) {
    pthread_mutex_lock(&big);
    const char* name = room && table[slot(handle)].handle ? table[slot(handle)].name : "?";
    pthread_mutex_unlock(&big);
    return name;
}

// ---- the one kernel that is executed: PyTorch's fill, so that zeros are zeros and not what the block held before
static int bytes_of(const char* mangled) {
    if (!strncmp(mangled, "N3c108BFloat16E", 15) || !strncmp(mangled, "N3c104HalfE", 11)) return 2;
    const char *types = "bahsilfd", *found = strchr(types, *mangled);
    return found ? (int[]){1, 1, 1, 2, 4, 8, 4, 8}[found - types] : 0;
}

// vectorized_elementwise_kernel<…, FillFunctor<T>, array<char*, 1>>(int count, FillFunctor<T>, array<char*, 1>)
static void fill(const char* name, void** arguments, Stream* stream) {
    const char* functor = strstr(name, "vectorized_elementwise_kernel") ? strstr(name, "FillFunctorI") : NULL;
    int width = functor ? bytes_of(functor + strlen("FillFunctorI")) : 0;
    if (!width) return;
    Write what = {.to = *(void**)arguments[2], .bytes = (size_t)width * *(int*)arguments[0], .width = width};
    memcpy(what.pattern, arguments[1], width);
    write_now_or_later(what, stream);
}

// ---- launches
static cudaError_t launch(
    const char* kind, const void* kernel, dim3 grid, dim3 block, size_t shared, const void* handle, void** arguments) {
    Stream* stream = stream_of(handle);
    int captured;
    cudaError_t error = enqueue(stream, &captured);
    if (error) return error;
    fill(name_of(kernel), arguments, stream);
    say("L %s %s grid=%u,%u,%u block=%u shared=%zu device=%d stream=%d capture=%d", kind, name_of(kernel), grid.x, grid.y, grid.z,
        block.x * block.y * block.z, shared, stream->device, stream->number, captured);
    return OK;
}

void** __cudaRegisterFatBinary(void* binary) { return calloc(1, sizeof(void*)); }
void __cudaRegisterFatBinaryEnd(void** binary) {}
void __cudaUnregisterFatBinary(void** binary) {}
char __cudaInitModule(void** binary) { return 1; }
void __cudaRegisterVar(void** binary, char* host, char* device, const char* name, int ext, size_t bytes, int constant, int global) {}
void __cudaRegisterFunction(
    void** binary, const char* host, char* device, const char* name, int limit, void* a, void* b, void* c, void* d, int* e) {
    name_it(host, name);
}
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void**)stream = configuration.stream;
    return OK;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return OK;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
    return launch("aten", kernel, grid, block, shared, stream, arguments);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
    return launch("aten", kernel, grid, block, shared, stream, arguments);
}
cudaError_t cudaLaunchCooperativeKernel(
    const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
    return launch("aten", kernel, grid, block, shared, stream, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void** arguments) {
    return launch("aten", kernel, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream, arguments);
}

// ---- what a library asks about its kernels
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* kernel) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = sm();
    a->maxDynamicSharedSizeBytes = 49152;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared) {
    *blocks = 2;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* kernel, int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return OK;
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
    *pointer = (void*)symbol;
    return OK;
}

// ---- driver modules (Triton's cubins). Loading one during a capture is refused: a kernel's first launch belongs into the warm-up.
static CUresult load(const char* what, CUmodule* module) {
    static size_t handles = 0x1000;
    CUresult error = unsafe(what);
    *module = (CUmodule)__sync_add_and_fetch(&handles, 16);
    if (!error) say("K %s device=%d", what, current_device());
    return error;
}
CUresult cuModuleLoad(CUmodule* module, const char* file) { return load("cuModuleLoad", module); }
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return load("cuModuleLoadData", module); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned n, CUjit_option* options, void** values) {
    return load("cuModuleLoadDataEx", module);
}
CUresult cuModuleUnload(CUmodule module) { return unsafe("cuModuleUnload"); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = malloc(16);
    name_it(*function, strdup(name));
    return 0;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t shared) {
    *blocks = 2;
    return 0;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* configuration) {
    *clusters = 16;
    return 0;
}
CUresult cuLaunchKernel(
    CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream,
    void** arguments, void** extra) {
    return launch("triton", f, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared, stream, arguments);
}
CUresult cuLaunchCooperativeKernel(
    CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream,
    void** arguments) {
    return launch("triton", f, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared, stream, arguments);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** arguments, void** extra) {
    dim3 grid = {c->gridDimX, c->gridDimY, c->gridDimZ}, block = {c->blockDimX, c->blockDimY, c->blockDimZ};
    return launch("triton", f, grid, block, c->sharedMemBytes, c->hStream, arguments);
}

// ---- cuBLAS: a handle is the place where its stream is kept
#define PRODUCT(handle, format, ...)                                                                              \
    do {                                                                                                          \
        Stream* queue = stream_of(handle);                                                                        \
        int captured;                                                                                             \
        if (enqueue(queue, &captured)) return CUBLAS_STATUS_EXECUTION_FAILED;                                     \
        say("G " format " device=%d stream=%d capture=%d", __VA_ARGS__, queue->device, queue->number, captured);  \
        return CUBLAS_STATUS_SUCCESS;                                                                             \
    } while (0)
#define ONE(op) ("NTC"[op])

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    *handle = calloc(1, sizeof(void*));
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    *(cudaStream_t*)handle = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t* stream) {
    *stream = *(cudaStream_t*)handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(
    cublasHandle_t h, cublasOperation_t a, cublasOperation_t b, int m, int n, int k, const void* alpha, const void* A,
    cudaDataType At, int lda, const void* B, cudaDataType Bt, int ldb, const void* beta, void* C, cudaDataType Ct, int ldc,
    cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    PRODUCT(*(void**)h, "cublasGemmEx m=%d n=%d k=%d ops=%c%c type=%d", m, n, k, ONE(a), ONE(b), At);
}
cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t h, cublasOperation_t a, cublasOperation_t b, int m, int n, int k, const void* alpha, const void* A,
    cudaDataType At, int lda, long long sa, const void* B, cudaDataType Bt, int ldb, long long sb, const void* beta, void* C,
    cudaDataType Ct, int ldc, long long sc, int count, cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    PRODUCT(*(void**)h, "cublasGemmStridedBatchedEx m=%d n=%d k=%d ops=%c%c type=%d batch=%d", m, n, k, ONE(a), ONE(b), At, count);
}
cublasStatus_t cublasSgemm_v2(
    cublasHandle_t h, cublasOperation_t a, cublasOperation_t b, int m, int n, int k, const float* alpha, const float* A, int lda,
    const float* B, int ldb, const float* beta, float* C, int ldc) {
    PRODUCT(*(void**)h, "cublasSgemm m=%d n=%d k=%d ops=%c%c type=0", m, n, k, ONE(a), ONE(b));
}
cublasStatus_t cublasSgemmStridedBatched(
    cublasHandle_t h, cublasOperation_t a, cublasOperation_t b, int m, int n, int k, const float* alpha, const float* A, int lda,
    long long sa, const float* B, int ldb, long long sb, const float* beta, float* C, int ldc, long long sc, int count) {
    PRODUCT(*(void**)h, "cublasSgemmStridedBatched m=%d n=%d k=%d ops=%c%c type=0 batch=%d", m, n, k, ONE(a), ONE(b), count);
}
cublasStatus_t cublasDgemm_v2(
    cublasHandle_t h, cublasOperation_t a, cublasOperation_t b, int m, int n, int k, const double* alpha, const double* A, int lda,
    const double* B, int ldb, const double* beta, double* C, int ldc) {
    PRODUCT(*(void**)h, "cublasDgemm m=%d n=%d k=%d ops=%c%c type=1", m, n, k, ONE(a), ONE(b));
}
cublasStatus_t cublasDgemmStridedBatched(
    cublasHandle_t h, cublasOperation_t a, cublasOperation_t b, int m, int n, int k, const double* alpha, const double* A, int lda,
    long long sa, const double* B, int ldb, long long sb, const double* beta, double* C, int ldc, long long sc, int count) {
    PRODUCT(*(void**)h, "cublasDgemmStridedBatched m=%d n=%d k=%d ops=%c%c type=1 batch=%d", m, n, k, ONE(a), ONE(b), count);
}

// ---- cuBLASLt: a layout keeps its shape
size_t cublasLtGetVersion(void) { return 130100; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t compute, cudaDataType_t type) {
    *description = calloc(1, sizeof(void*));
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    free(description);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = calloc(1, sizeof(void*));
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows, uint64_t columns, int64_t ld) {
    int* shape = malloc(3 * sizeof *shape);
    shape[0] = rows;
    shape[1] = columns;
    shape[2] = type;
    *layout = (void*)shape;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B, cublasLtMatrixLayout_t C,
    cublasLtMatrixLayout_t D, cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t* found, int* count) {
    memset(found, 0, sizeof *found);
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void* alpha, const void* A, cublasLtMatrixLayout_t a, const void* B,
    cublasLtMatrixLayout_t b, const void* beta, const void* C, cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t out,
    const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t bytes, cudaStream_t stream) {
    int *result = (void*)out, *left = (void*)a, m = result[0], n = result[1];
    PRODUCT(stream, "cublasLtMatmul m=%d n=%d k=%d type=%d", m, n, left[0] == m ? left[1] : left[0], left[2]);
}

// ---- cuDNN is not there. Without this its real library would start, and crash on what is not modelled.
int cudnnCreate(void** handle) {
    say("X cudnnCreate: cuDNN is not there");
    return 1001;  // CUDNN_STATUS_NOT_INITIALIZED
}
