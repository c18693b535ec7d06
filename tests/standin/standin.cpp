// CUDA's runtime, cuBLAS and cuDNN without a GPU, as far as ONNX Runtime's CUDA provider calls them.
//
// A device's memory is the processor's and kernels do nothing; every call is a line of the file
// that LATENTRT_CUDA_LOG names: its kind, the function, and what there is to say. What a stream
// that is being captured does not allow is refused, as the driver does. All other functions are
// written by build.py and answer that they succeeded.

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t ALIGNMENT = 256;
constexpr size_t MAX_COPIED = 1 << 20;  // larger arrays are weights and pictures, of no use here
constexpr int MULTIPROCESSORS = 132;
constexpr size_t DRIVERS_OWN = 2ull << 30;  // bytes of a device that nobody is given

FILE *log_file() {
    static FILE *file = [] {
        const char *path = getenv("LATENTRT_CUDA_LOG");
        FILE *opened = fopen(path ? path : "/dev/null", "a");
        setvbuf(opened, nullptr, _IOLBF, 1 << 16);
        return opened;
    }();
    return file;
}

void say(const char *kind, const char *function, const std::string &what = "") {
    fprintf(log_file(), "%s %s %s\n", kind, function, what.c_str());
}

int compute_capability() {
    static const int value = [] {
        const char *stated = getenv("LATENTRT_CUDA_SM");
        return stated ? atoi(stated) : 90;
    }();
    return value;
}

cudaStream_t captured = nullptr;  // the one stream that is being captured
bool invalid = false;             // it was asked for what cannot be captured
thread_local cudaError_t last = cudaSuccess;

// Whether a call is refused because of a capture; the capture is then invalid, and the error stays
// the thread's last until it is asked for.
bool refused(const char *function) {
    if (!captured) return false;
    say("refused", function);
    invalid = true;
    last = cudaErrorStreamCaptureUnsupported;
    return true;
}

#define REFUSE_WHILE_CAPTURED(function) \
    if (refused(function)) return cudaErrorStreamCaptureUnsupported

void *take(size_t bytes) {
    void *raw = calloc(1, bytes + 2 * ALIGNMENT);  // large pieces are zero pages until written
    auto address = (reinterpret_cast<uintptr_t>(raw) / ALIGNMENT + 2) * ALIGNMENT;
    reinterpret_cast<void **>(address)[-1] = raw;
    return reinterpret_cast<void *>(address);
}

void give_back(void *memory) {
    if (memory) free(static_cast<void **>(memory)[-1]);
}

// The pieces of the device's memory that are taken, and the bytes of all.
std::mutex guard;
size_t taken = 0;
std::unordered_map<const void *, size_t> &pieces() {
    static auto *sizes = new std::unordered_map<const void *, size_t>;
    return *sizes;
}

// An H100's memory, or the bytes that LATENTRT_CUDA_BYTES says.
size_t device_bytes() {
    static const size_t value = [] {
        const char *stated = getenv("LATENTRT_CUDA_BYTES");
        return stated ? strtoull(stated, nullptr, 10) : 80ull << 30;
    }();
    return value;
}

size_t free_bytes() { return device_bytes() - DRIVERS_OWN - taken; }

std::unordered_map<const void *, std::string> &kernels() {
    static auto *names = new std::unordered_map<const void *, std::string>;
    return *names;
}

cudaError_t launched(const void *kernel) {
    auto found = kernels().find(kernel);
    say("launch", "kernel", found == kernels().end() ? "?" : found->second);
    return cudaSuccess;
}

const char *direction(cudaMemcpyKind kind) {
    static const char *names[] = {"HtoH", "HtoD", "DtoH", "DtoD", "default"};
    return names[kind];
}

void copied(const char *function, void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    say("copy", function, std::string(direction(kind)) + " " + std::to_string(bytes));
    if (bytes <= MAX_COPIED) memcpy(to, from, bytes);
}

template <typename Handle> cudaError_t made(Handle *handle) {
    static uintptr_t serial = 0x1000;
    *handle = reinterpret_cast<Handle>(serial += 16);
    return cudaSuccess;
}

}  // namespace

API void standin_say(const char *kind, const char *function) { say(kind, function); }

// Kernels

API void **__cudaRegisterFatBinary(void *) { return static_cast<void **>(calloc(1, sizeof(void *))); }
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *, void *, int *) {
    kernels()[host] = name;
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(host));
    return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) { return launched(kernel); }
API cudaError_t cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t) { return launched(kernel); }
API cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t) { return launched(kernel); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *kernel, void **) { return launched(kernel); }

static thread_local struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st *stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<void **>(stream) = configuration.stream;
    return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = compute_capability();
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

// Memory

static cudaError_t allocated(const char *function, void **memory, size_t bytes, bool of_device = true) {
    REFUSE_WHILE_CAPTURED(function);
    std::lock_guard lock(guard);
    *memory = nullptr;
    if (of_device && bytes > free_bytes()) {
        say("exhausted", function, std::to_string(bytes));
        return last = cudaErrorMemoryAllocation;
    }
    say("allocate", function, std::to_string(bytes));
    *memory = take(bytes);
    if (of_device) taken += pieces()[*memory] = bytes;
    return cudaSuccess;
}
static cudaError_t freed(const char *function, void *memory) {
    std::lock_guard lock(guard);
    size_t bytes = 0;
    if (auto found = pieces().find(memory); found != pieces().end()) {
        taken -= bytes = found->second;
        pieces().erase(found);
    }
    say("free", function, std::to_string(bytes));
    give_back(memory);
    return cudaSuccess;
}
API cudaError_t cudaMalloc(void **memory, size_t bytes) { return allocated("cudaMalloc", memory, bytes); }
API cudaError_t cudaMallocFromPoolAsync(void **memory, size_t bytes, cudaMemPool_t, cudaStream_t) { return allocated("cudaMallocFromPoolAsync", memory, bytes); }
API cudaError_t cudaMallocHost(void **memory, size_t bytes) { return allocated("cudaMallocHost", memory, bytes, false); }
API cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) { return allocated("cudaHostAlloc", memory, bytes, false); }
API cudaError_t cudaFree(void *memory) { return freed("cudaFree", memory); }
API cudaError_t cudaFreeHost(void *memory) { return freed("cudaFreeHost", memory); }
API cudaError_t cudaFreeAsync(void *memory, cudaStream_t) { return freed("cudaFreeAsync", memory); }
API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    REFUSE_WHILE_CAPTURED("cudaMemcpy");
    say("wait", "cudaMemcpy");
    copied("cudaMemcpy", to, from, bytes, kind);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    copied("cudaMemcpyAsync", to, from, bytes, kind);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t) {
    say("copy", "cudaMemcpy2DAsync", std::string(direction(kind)) + " " + std::to_string(width * height));
    for (size_t row = 0; width * height <= MAX_COPIED && row < height; row++)
        memcpy(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyFromSymbol(void *to, const void *, size_t bytes, size_t, cudaMemcpyKind) {
    REFUSE_WHILE_CAPTURED("cudaMemcpyFromSymbol");
    say("wait", "cudaMemcpyFromSymbol");
    memset(to, 0, bytes);
    return cudaSuccess;
}
API cudaError_t cudaMemset(void *, int, size_t bytes) {
    REFUSE_WHILE_CAPTURED("cudaMemset");
    say("memset", "cudaMemset", std::to_string(bytes));
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void *, int, size_t bytes, cudaStream_t) {
    say("memset", "cudaMemsetAsync", std::to_string(bytes));
    return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    std::lock_guard lock(guard);
    *available = free_bytes();
    *total = device_bytes();
    return cudaSuccess;
}
API cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const cudaMemPoolProps *) { return made(pool); }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *memory) {
    *attributes = {};
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = const_cast<void *>(memory);
    return cudaSuccess;
}

// The device

API cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
API cudaError_t cudaGetDevice(int *index) { *index = 0; return cudaSuccess; }
API cudaError_t cudaSetDevice(int) { return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *facts, int) {  // an H100's
    *facts = {};
    strcpy(facts->name, "a stand-in");
    facts->major = compute_capability() / 10;
    facts->minor = compute_capability() % 10;
    facts->totalGlobalMem = device_bytes();
    facts->multiProcessorCount = MULTIPROCESSORS;
    facts->l2CacheSize = 50 << 20;
    facts->totalConstMem = 65536;
    facts->sharedMemPerBlock = 49152;
    facts->sharedMemPerBlockOptin = 232448;
    facts->sharedMemPerMultiprocessor = 233472;
    facts->regsPerBlock = facts->regsPerMultiprocessor = 65536;
    facts->warpSize = 32;
    facts->maxThreadsPerBlock = facts->maxThreadsDim[0] = facts->maxThreadsDim[1] = 1024;
    facts->maxThreadsDim[2] = 64;
    facts->maxThreadsPerMultiProcessor = 2048;
    facts->maxBlocksPerMultiProcessor = 32;
    facts->maxGridSize[0] = 0x7fffffff;
    facts->maxGridSize[1] = facts->maxGridSize[2] = 65535;
    facts->textureAlignment = 512;
    facts->memoryBusWidth = 5120;
    facts->asyncEngineCount = 3;
    facts->concurrentKernels = facts->unifiedAddressing = facts->managedMemory = 1;
    facts->cooperativeLaunch = facts->memoryPoolsSupported = facts->canMapHostMemory = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    static const std::unordered_map<int, int> values = {
        {cudaDevAttrComputeCapabilityMajor, compute_capability() / 10},
        {cudaDevAttrComputeCapabilityMinor, compute_capability() % 10},
        {cudaDevAttrMultiProcessorCount, MULTIPROCESSORS},
        {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
        {cudaDevAttrMaxRegistersPerBlock, 65536},
        {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMaxGridDimX, 0x7fffffff},
        {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535},
        {cudaDevAttrL2CacheSize, 50 << 20},
        {cudaDevAttrMemoryPoolsSupported, 1},
        {cudaDevAttrCooperativeLaunch, 1},
    };
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return cudaSuccess;
}

// Streams, events, errors, recorded graphs

API cudaError_t cudaStreamCreate(cudaStream_t *stream) { return made(stream); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return made(stream); }
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return made(event); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return made(event); }
API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) { *milliseconds = 1; return cudaSuccess; }
static cudaError_t waited(const char *function) {
    REFUSE_WHILE_CAPTURED(function);
    say("wait", function);
    return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return waited("cudaStreamSynchronize"); }
API cudaError_t cudaDeviceSynchronize() { return waited("cudaDeviceSynchronize"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return waited("cudaEventSynchronize"); }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t work, void *given) {
    say("host", "cudaLaunchHostFunc");
    work(given);
    return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    say("other", "cudaStreamBeginCapture");
    captured = stream;
    invalid = false;
    return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    *status = stream && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    say("other", "cudaStreamEndCapture");
    captured = nullptr;
    *graph = nullptr;
    return invalid ? cudaErrorStreamCaptureInvalidated : made(graph);
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *graph, cudaGraph_t, unsigned long long) { return made(graph); }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    say("launch", "graph");
    return cudaSuccess;
}
API cudaError_t cudaGetLastError() {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API const char *cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
API const char *cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheStandIn"; }

// cuBLAS

static int handle(void **made_one) { *made_one = calloc(1, ALIGNMENT); return 0; }
API int cublasCreate_v2(void **h) { return handle(h); }
API int cublasLtCreate(void **h) { return handle(h); }
API int cublasLtMatmulDescCreate(void **h, ...) { return handle(h); }
API int cublasLtMatrixLayoutCreate(void **h, ...) { return handle(h); }
API int cublasLtMatmulPreferenceCreate(void **h, ...) { return handle(h); }
API int cublasLtMatrixTransformDescCreate(void **h, ...) { return handle(h); }
API int cublasGetMathMode(void *, int *mode) { *mode = 0; return 0; }
API const char *cublasGetStatusName(int) { return "an error of the stand-in"; }
API const char *cublasGetStatusString(int) { return "an error of the stand-in"; }
API int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, char *found, int *count) {
    memset(found, 0, 64);
    *count = 1;
    return 0;
}

// cuDNN: a descriptor remembers its type and its integers; every graph has one engine that takes it

namespace {

enum { INT64 = 3, DESCRIPTOR = 15, INT32 = 23 };  // cudnnBackendAttributeType_t
enum {                                            // cudnnBackendAttributeName_t
    KNOBS = 302,
    FILTER = 703,
    DIMENSIONS = 902,
    STRIDES = 903,
    NUMERICAL_NOTES = 1303,
    BEHAVIOR_NOTES = 1305
};
constexpr int CONVOLUTION = 10;  // cudnnBackendDescriptorType_t

struct Descriptor {
    int type;
    std::unordered_map<int, std::string> integers;
};

}  // namespace

API size_t cudnnGetVersion() { return 91900; }
API size_t cudnnGetCudartVersion() { return 13000; }
API const char *cudnnGetErrorString(int) { return "an error of the stand-in"; }
API void cudnnGetLastErrorString(char *text, size_t bytes) { if (bytes) *text = 0; }
API int cudnnCreate(void **h) { return handle(h); }
API int cudnnGetStream(void *, void **stream) { *stream = nullptr; return 0; }
API int cudnnCreateTensorDescriptor(void **h) { return handle(h); }
API int cudnnCreateFilterDescriptor(void **h) { return handle(h); }
API int cudnnCreateConvolutionDescriptor(void **h) { return handle(h); }
API int cudnnCreateActivationDescriptor(void **h) { return handle(h); }
API int cudnnCreatePoolingDescriptor(void **h) { return handle(h); }
API int cudnnCreateReduceTensorDescriptor(void **h) { return handle(h); }
API int cudnnCreateDropoutDescriptor(void **h) { return handle(h); }
API int cudnnCreateLRNDescriptor(void **h) { return handle(h); }
API int cudnnCreateRNNDescriptor(void **h) { return handle(h); }
API int cudnnCreateRNNDataDescriptor(void **h) { return handle(h); }
API int cudnnGetReductionWorkspaceSize(void *, void *, void *, void *, size_t *bytes) { *bytes = 0; return 0; }
API int cudnnGetReductionIndicesSize(void *, void *, void *, void *, size_t *bytes) { *bytes = 0; return 0; }
API int cudnnBackendCreateDescriptor(int type, void **made_one) {
    *made_one = new Descriptor{type, {}};
    return 0;
}
API int cudnnBackendDestroyDescriptor(void *descriptor) {
    delete static_cast<Descriptor *>(descriptor);
    return 0;
}
API int cudnnBackendFinalize(void *) { return 0; }
API int cudnnBackendSetAttribute(void *descriptor, int name, int type, long long count, const void *given) {
    auto &described = *static_cast<Descriptor *>(descriptor);
    if (type == INT64) {
        std::string text;
        for (long long i = 0; i < count; i++) text += std::to_string(static_cast<const long long *>(given)[i]) + ",";
        described.integers[name] = text;
    } else if (described.type == CONVOLUTION && name == FILTER) {
        auto &filter = (*static_cast<Descriptor *const *>(given))->integers;
        say("filter", "cudnnBackendSetAttribute", filter[DIMENSIONS] + " " + filter[STRIDES]);
    }
    return 0;
}
API int cudnnBackendGetAttribute(void *, int name, int type, long long asked, long long *count, void *found) {
    long long there = 1;
    if (name == KNOBS || name == BEHAVIOR_NOTES) there = 0;
    else if (name == NUMERICAL_NOTES) { if (found) *static_cast<int *>(found) = 0; }  // tensor cores
    else if (type == INT64 && found && asked) *static_cast<long long *>(found) = 0;
    else if (type == INT32 && found && asked) *static_cast<int *>(found) = 0;
    else if (type != INT64 && type != INT32 && type != DESCRIPTOR) there = 0;
    if (count) *count = there;
    return 0;
}
