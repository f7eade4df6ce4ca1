// The operators as custom operators of ONNX Runtime, for its CPU provider: one class for all, which runs the
// host side of an operator on the runtime's memory and threads.
//
// ONNX Runtime takes an operator that is registered before the function of that name in a file. As an
// operator of a name must state types, each is registered once for every type of its first input.
#include <memory>
#include <mutex>

#include "../standalone/node.h"
#include "abi.h"
#include "call.h"

namespace vitrail::onnxruntime {
namespace {

using namespace onnxruntime_abi;
using namespace standalone;

template <class Function, class... Arguments>
auto call(const OrtApi& api, Arguments... arguments) {
    return reinterpret_cast<typename Function::Pointer>(api.functions[Function::place])(arguments...);
}

// The same for functions that return what went wrong, which is thrown.
template <class Function, class... Arguments>
void checked(const OrtApi& api, Arguments... arguments) {
    OrtStatus* const status = call<Function>(api, arguments...);
    if (!status) return;
    const std::string message = call<GetErrorMessage>(api, status);
    call<ReleaseStatus>(api, status);
    throw std::runtime_error(message);
}

// Runs `action`; what it throws becomes a status, as no exception may pass the interface.
template <class Action>
OrtStatus* guarded(const OrtApi& api, const std::string& name, Action action) noexcept {
    try {
        try {
            action();
            return nullptr;
        } catch (const std::exception& error) {
            return call<CreateStatus>(api, kInvalidArgument,
                                      ("vitrail::" + name + ": " + error.what()).c_str());
        }
    } catch (...) {  // of no kind that is known, or no memory for the message
        return call<CreateStatus>(api, kFail, "vitrail: an unknown error");
    }
}

ScalarType scalar_type(ElementType type) {
    switch (type) {
        case kFloat:
            return ScalarType::Float;
        case kFloat16:
            return ScalarType::Half;
        case kBFloat16:
            return ScalarType::BFloat16;
        case kInt32:
            return ScalarType::Int;
        case kInt64:
            return ScalarType::Long;
        default:
            throw std::invalid_argument(
                "tensors must be float32, float16, bfloat16, int32 or int64, "
                "got ONNX type " +
                std::to_string(int(type)));
    }
}

Tensor tensor_of(const OrtApi& api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* found = nullptr;
    checked<GetTensorTypeAndShape>(api, value, &found);
    const auto release = [&api](OrtTensorTypeAndShapeInfo* info) {
        call<ReleaseTensorTypeAndShapeInfo>(api, info);
    };
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(found, release);
    ElementType type = kUndefined;
    size_t dimensions = 0;
    void* data = nullptr;
    checked<GetTensorElementType>(api, info.get(), &type);
    checked<GetDimensionsCount>(api, info.get(), &dimensions);
    std::vector<int64_t> sizes(dimensions);
    checked<GetDimensions>(api, info.get(), sizes.data(), dimensions);
    checked<GetTensorMutableData>(api, const_cast<OrtValue*>(value), &data);
    return {data, scalar_type(type), std::move(sizes)};
}

// --- kernels ---

class InfoAttributes : public Attributes {
  public:
    InfoAttributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

    std::string text(const std::string& name) const override {
        std::vector<char> text = sized<KernelInfoGetAttribute_string, char>(name, "text");
        return text.data();
    }
    std::vector<int64_t> integers(const std::string& name) const override {
        return sized<KernelInfoGetAttributeArray_int64, int64_t>(name, "a list of integers");
    }
    int64_t integer(const std::string& name) const override {
        int64_t value = 0;
        found(name, "an integer", call<KernelInfoGetAttribute_int64>(api_, info_, name.c_str(), &value));
        return value;
    }
    double number(const std::string& name) const override {
        float value = 0;
        found(name, "a number", call<KernelInfoGetAttribute_float>(api_, info_, name.c_str(), &value));
        return value;
    }

  private:
    // Of an attribute that comes in two calls, of which the first says how long it is.
    template <class Function, class T>
    std::vector<T> sized(const std::string& name, const char* kind) const {
        size_t length = 0;
        found(name, kind, call<Function>(api_, info_, name.c_str(), static_cast<T*>(nullptr), &length));
        std::vector<T> values(length);
        found(name, kind, call<Function>(api_, info_, name.c_str(), values.data(), &length));
        return values;
    }

    void found(const std::string& name, const char* kind, OrtStatus* status) const {
        if (!status) return;
        call<ReleaseStatus>(api_, status);
        throw std::invalid_argument("the node has no attribute " + name + ", or it is not " + kind);
    }

    const OrtApi& api_;
    const OrtKernelInfo* const info_;
};

class KernelCall : public Call {
  public:
    KernelCall(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {}

    void* result(const std::vector<int64_t>& sizes) override {
        OrtValue* value = nullptr;
        void* data = nullptr;
        checked<KernelContext_GetOutput>(api_, context_, size_t(0), sizes.data(), sizes.size(), &value);
        checked<GetTensorMutableData>(api_, value, &data);
        return data;
    }
    void share_out(size_t count, void (*task)(void*, size_t), void* argument) override {
        const OrtKernelContext* const context = context_;
        checked<KernelContext_ParallelFor>(api_, context, task, count, size_t(0), argument);
    }

  private:
    const OrtApi& api_;
    OrtKernelContext* const context_;
};

class Kernel {
  public:
    Kernel(const OrtApi& api, const std::string& operation, const OrtKernelInfo* info)
        : api_(api), node_(operation, InfoAttributes(api, info)) {}

    OrtStatus* run(OrtKernelContext* context) const {
        return guarded(api_, node_.operation(), [&] {
            const OrtKernelContext* const inputs = context;
            size_t count = 0;
            checked<KernelContext_GetInputCount>(api_, inputs, &count);
            node_.check_inputs(count);
            std::vector<Tensor> tensors;
            for (size_t i = 0; i < count; ++i) {
                const OrtValue* value = nullptr;
                checked<KernelContext_GetInput>(api_, inputs, i, &value);
                if (!value) throw std::invalid_argument("input " + node_.inputs()[i] + " is not given");
                tensors.push_back(tensor_of(api_, value));
            }
            const KernelCall running(api_, context);
            node_.run(tensors);
        });
    }

  private:
    const OrtApi& api_;
    const Node node_;
};

// --- operators ---

// What is registered: an operator under one of its names, for one type.
struct Registered : OrtCustomOp {
    Registered(std::string operation_, int number, ElementType type_)
        : OrtCustomOp{},
          operation(std::move(operation_)),
          name(name_of_variant(operation, number)),
          type(type_),
          result(operators().at(operation).chooses ? kInt64 : type_) {
        version = kVersion;
        GetName = [](const OrtCustomOp* self) { return of(self).name.c_str(); };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
        // The first input, and all others, of whatever types: which they are, only the node says.
        GetInputTypeCount = [](const OrtCustomOp*) { return size_t(2); };
        GetInputType = [](const OrtCustomOp* self, size_t i) { return i == 0 ? of(self).type : kUndefined; };
        GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i == 0 ? kRequired : kVariadic; };
        GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kDefaultMemory; };
        GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
        GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
        GetOutputType = [](const OrtCustomOp* self, size_t) { return of(self).result; };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
        GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info,
                            void** kernel) {
            const std::string& operation = of(self).operation;
            return guarded(*api, operation, [&] { *kernel = new Kernel(*api, operation, info); });
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
            return static_cast<const Kernel*>(kernel)->run(context);
        };
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    }

    static const Registered& of(const OrtCustomOp* self) { return *static_cast<const Registered*>(self); }

    const std::string operation, name;
    const ElementType type, result;
};

const std::vector<std::unique_ptr<Registered>>& all() {
    static const auto made = [] {
        std::vector<std::unique_ptr<Registered>> made;
        for (const auto& [operation, rules] : operators())
            for (int number = 1; number <= kMostVariants; ++number)
                for (const ElementType type : {kFloat, kFloat16, kBFloat16})
                    made.push_back(std::make_unique<Registered>(operation, number, type));
        return made;
    }();
    return made;
}

// The domain with all operators. It has to outlive the sessions, so one is kept for each runtime in the
// process.
OrtCustomOpDomain* domain_of(const OrtApi& api) {
    static std::mutex mutex;
    static std::map<const OrtApi*, OrtCustomOpDomain*> known;
    const std::lock_guard<std::mutex> lock(mutex);
    OrtCustomOpDomain*& domain = known[&api];
    if (domain) return domain;
    OrtCustomOpDomain* made = nullptr;
    checked<CreateCustomOpDomain>(api, kNamespace, &made);
    for (const auto& op : all())
        checked<CustomOpDomain_Add>(api, made, static_cast<const OrtCustomOp*>(op.get()));
    return domain = made;
}

OrtStatus* register_all(OrtSessionOptions* options, const OrtApiBase& base) {
    const OrtApi* const api = base.GetApi(kVersion);
    if (!api) {  // the first version can make a status, too
        const std::string message =
            std::string("vitrail's kernels need ONNX Runtime 1.17 or newer, this one is ") +
            base.GetVersionString() + "; without them the file runs on the functions that it holds";
        return call<CreateStatus>(*base.GetApi(1), kNotImplemented, message.c_str());
    }
    return guarded(*api, "RegisterCustomOps",
                   [&] { checked<AddCustomOpDomain>(*api, options, domain_of(*api)); });
}

}  // namespace
}  // namespace vitrail::onnxruntime

// What ONNX Runtime looks for in a library of custom operators.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
    return vitrail::onnxruntime::register_all(options, *base);
}
