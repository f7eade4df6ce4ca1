// What ONNX Runtime and a library of custom operators agree on, as far as this one goes: a structure for each
// operator, and a table of functions, to which later versions only add. ONNX Runtime's own header comes with
// its archives, not with its Python package; this is the part of the interface that is needed, so that the
// library can be built wherever a C++ compiler is. Names are those of the interface, as they are part of it.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtCustomOp;

namespace onnxruntime_abi {

// ONNX Runtime 1.17, the first in which kernels may use the session's threads.
constexpr uint32_t kVersion = 17;

enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType : int32_t {
    kUndefined = 0,
    kFloat = 1,
    kInt32 = 6,
    kInt64 = 7,
    kFloat16 = 10,
    kBFloat16 = 16
};
enum Characteristic : int32_t { kRequired = 0, kVariadic = 2 };
enum MemoryType : int32_t { kDefaultMemory = 0 };

// A function of the table, by its place there.
template <size_t place_, class Signature>
struct Function {
    static constexpr size_t place = place_;
    using Pointer = Signature*;
};

using CreateStatus = Function<0, OrtStatus*(ErrorCode, const char* message)>;
using GetErrorMessage = Function<2, const char*(const OrtStatus*)>;
using CreateCustomOpDomain = Function<26, OrtStatus*(const char* name, OrtCustomOpDomain**)>;
using CustomOpDomain_Add = Function<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Function<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Function<51, OrtStatus*(OrtValue*, void**)>;
using GetTensorElementType = Function<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, ElementType*)>;
using GetDimensionsCount = Function<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;
using GetDimensions = Function<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>;
using GetTensorTypeAndShape = Function<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>;
using KernelInfoGetAttribute_float = Function<85, OrtStatus*(const OrtKernelInfo*, const char*, float*)>;
using KernelInfoGetAttribute_int64 = Function<86, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>;
using KernelInfoGetAttribute_string =
    Function<87, OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>;
using KernelContext_GetInputCount = Function<88, OrtStatus*(const OrtKernelContext*, size_t*)>;
using KernelContext_GetInput = Function<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using KernelContext_GetOutput =
    Function<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t* sizes, size_t dimensions, OrtValue**)>;
using ReleaseStatus = Function<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Function<99, void(OrtTensorTypeAndShapeInfo*)>;
using ReleaseCustomOpDomain = Function<101, void(OrtCustomOpDomain*)>;
using KernelInfoGetAttributeArray_int64 =
    Function<163, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*, size_t*)>;
using KernelContext_ParallelFor = Function<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t),
                                                           size_t count, size_t batches, void* argument)>;

}  // namespace onnxruntime_abi

// The table of functions.
struct OrtApi {
    void* functions[1];  // and more
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);  // null where the runtime is older than that
    const char* (*GetVersionString)();
};

// An operator for some types. What a runtime of a later version knows further stays null.
struct OrtCustomOp {
    using Type = onnxruntime_abi::ElementType;
    using Characteristic = onnxruntime_abi::Characteristic;

    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    Type (*GetInputType)(const OrtCustomOp*, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    Type (*GetOutputType)(const OrtCustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void* kernel, OrtKernelContext*);
    void (*KernelDestroy)(void* kernel);
    Characteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
    Characteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
    onnxruntime_abi::MemoryType (*GetInputMemoryType)(const OrtCustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    size_t (*GetMayInplace)(int** inputs, int** outputs);
    void (*ReleaseMayInplace)(int* inputs, int* outputs);
    size_t (*GetAliasMap)(int** inputs, int** outputs);
    void (*ReleaseAliasMap)(int* inputs, int* outputs);
};
