// The operators as plugins of TensorRT: one class for all, an `IPluginV3` that runs the host side of an
// operator on TensorRT's memory and stream.
//
// A node of an ONNX file becomes a plugin by its name, that of the operator or one with a number behind it
// (`routed_attention_2`): functions of a file are told apart by their names alone. Its attributes are the
// operator's settings, and `inputs`, the names of the tensors that it is given.
#include <algorithm>
#include <cstdio>
#include <memory>

#include "../standalone/node.h"
#include "call.h"
#include "results.h"

namespace vitrail::tensorrt {
namespace {

using namespace nvinfer1;
using namespace nvinfer1::v_1_0;
using namespace standalone;

constexpr const char* kVersion = "1";

// The last error of this thread, for those who loaded the library. It goes to stderr, too, and not to
// TensorRT's logger, whose layout is not the same in all versions.
std::string& last_error() {
    static thread_local std::string message;
    return message;
}

void report(const std::string& name, const std::string& message) {
    last_error() = "vitrail::" + name + ": " + message;
    std::fprintf(stderr, "%s\n", last_error().c_str());
}

// What `action` returns; where it throws, the message is reported and `otherwise` is returned.
template <class Result, class Action>
Result guarded(const std::string& name, Result otherwise, Action action) noexcept {
    try {
        return action();
    } catch (const std::exception& error) {
        report(name, error.what());
    } catch (...) {
        report(name, "an unknown error");
    }
    return otherwise;
}

bool is_number(DataType type) {
    return type == DataType::kFloat || type == DataType::kHalf || type == DataType::kBFloat16;
}

bool is_index(DataType type) {
    return type == DataType::kInt32 || type == DataType::kInt64;
}

ScalarType scalar_type(DataType type) {
    switch (type) {
        case DataType::kFloat:
            return ScalarType::Float;
        case DataType::kHalf:
            return ScalarType::Half;
        case DataType::kBFloat16:
            return ScalarType::BFloat16;
        case DataType::kInt32:
            return ScalarType::Int;
        case DataType::kInt64:
            return ScalarType::Long;
    }
    throw std::invalid_argument("a tensor of type " + std::to_string(int(type)) + " is not supported");
}

// --- settings ---

template <class T>
std::vector<T> entries(const PluginField& field) {
    const auto all = [&](const auto* data) { return std::vector<T>(data, data + field.length); };
    switch (field.type) {
        case PluginFieldType::kFloat32:
            return all(static_cast<const float*>(field.data));
        case PluginFieldType::kFloat64:
            return all(static_cast<const double*>(field.data));
        case PluginFieldType::kInt32:
            return all(static_cast<const int32_t*>(field.data));
        case PluginFieldType::kInt64:
            return all(static_cast<const int64_t*>(field.data));
        default:
            throw std::invalid_argument(std::string("attribute ") + field.name + " must hold numbers");
    }
}

class FieldAttributes : public Attributes {
  public:
    explicit FieldAttributes(const PluginFieldCollection& fields) {
        for (int32_t i = 0; i < fields.count; ++i) given_.emplace(fields.fields[i].name, &fields.fields[i]);
    }

    std::string text(const std::string& name) const override {
        const PluginField& found = field(name);
        if (found.type != PluginFieldType::kChar)
            throw std::invalid_argument("attribute " + name + " must be text");
        return std::string(static_cast<const char*>(found.data), size_t(found.length));
    }
    std::vector<int64_t> integers(const std::string& name) const override {
        return entries<int64_t>(field(name));
    }
    int64_t integer(const std::string& name) const override { return one<int64_t>(name); }
    double number(const std::string& name) const override { return one<double>(name); }

  private:
    const PluginField& field(const std::string& name) const {
        const auto found = given_.find(name);
        if (found == given_.end()) throw std::invalid_argument("the node has no attribute " + name);
        return *found->second;
    }

    template <class T>
    T one(const std::string& name) const {
        if (field(name).length != 1) throw std::invalid_argument("attribute " + name + " must be one number");
        return entries<T>(field(name))[0];
    }

    std::map<std::string, const PluginField*> given_;
};

// Inputs as large as they make the workspace: where the number of regions is stated, they are most where they
// divide the grid.
void enlarge(const Node& node, std::vector<Tensor>& tensors) {
    const auto found = node.settings().find("region_size");
    if (found == node.settings().end() || found->second.sizes.size() != 2) return;
    const std::vector<int64_t>& region = found->second.sizes;
    const auto whole = [](int64_t extent, int64_t size) {
        return size < 0 ? quotient(extent, -size) * -size : extent;
    };
    const auto pieces = [](int64_t extent, int64_t size) {
        return size < 0 ? -size : quotient(extent, size);
    };
    for (Tensor& t : tensors) {
        std::vector<int64_t> sizes = sizes_of(t);
        if (t.dim() == 4) {
            sizes[1] = whole(sizes[1], region[0]);
            sizes[2] = whole(sizes[2], region[1]);
        } else if (t.dim() == 3) {
            sizes[1] = pieces(tensors[0].size(1), region[0]) * pieces(tensors[0].size(2), region[1]);
        }
        t = Tensor(t.mutable_data_ptr(), t.scalar_type(), sizes);
    }
}

// Settings as TensorRT stores them in an engine.
class Fields {
  public:
    explicit Fields(const Node& node) {
        for (const std::string& name : node.inputs()) text_ += (text_.empty() ? "" : ",") + name;
        add("inputs", text_.data(), PluginFieldType::kChar, text_.size());
        for (const auto& [name, value] : node.settings()) {
            switch (node.kind_of(name)) {
                case Kind::kSizes:
                    add(name.c_str(), value.sizes.data(), PluginFieldType::kInt64, value.sizes.size());
                    break;
                case Kind::kInteger:
                    add(name.c_str(), &value.integer, PluginFieldType::kInt64, 1);
                    break;
                default:
                    add(name.c_str(), &value.number, PluginFieldType::kFloat64, 1);
            }
        }
        collection_ = {int32_t(fields_.size()), fields_.data()};
    }
    Fields(const Fields&) = delete;

    const PluginFieldCollection* collection() const { return &collection_; }

  private:
    void add(const char* name, const void* data, PluginFieldType type, size_t length) {
        fields_.push_back({name, data, type, int32_t(length)});
    }

    std::string text_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_;
};

// --- the plugin ---

Tensor tensor_of(const PluginTensorDesc& desc, const Dims& dims, const void* data) {
    return {const_cast<void*>(data), scalar_type(desc.type),
            std::vector<int64_t>(dims.d, dims.d + dims.count)};
}

class Plugin : public IPluginV3,
               public IPluginV3OneCore,
               public IPluginV3OneBuild,
               public IPluginV3OneRuntime {
  public:
    Plugin(std::string name, std::shared_ptr<const Node> node)
        : name_(std::move(name)), node_(std::move(node)), fields_(*node_) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCore:
                return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBuild:
                return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRuntime:
                return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        return guarded<IPluginV3*>(name_, nullptr, [&] { return new Plugin(name_, node_); });
    }

    const char* getPluginName() const noexcept override { return name_.c_str(); }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    // --- building ---

    // Runs the operator's checks, so that what it refuses is refused here and not when an engine runs.
    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                            int32_t) noexcept override {
        return guarded(name_, -1, [&] {
            measured(in, inputs);
            return 0;
        });
    }

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in,
                               int32_t inputs) const noexcept override {
        return guarded(name_, -1, [&] {
            node_->check_inputs(size_t(inputs));
            out[0] = node_->rules().chooses ? DataType::kInt64 : in[0];
            return 0;
        });
    }

    int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                            int32_t, IExprBuilder& builder) noexcept override {
        return guarded(name_, -1, [&] {
            node_->check_inputs(size_t(inputs));
            Shapes shapes = {builder, {}, node_->settings()};
            for (int32_t i = 0; i < inputs; ++i) {
                std::vector<Size>& sizes = shapes.inputs[node_->inputs()[i]];
                for (int32_t axis = 0; axis < in[i].count; ++axis) sizes.emplace_back(builder, in[i].d[axis]);
            }
            const std::vector<Size> result = result_of(node_->operation(), shapes);
            out[0].count = int32_t(result.size());
            for (size_t axis = 0; axis < result.size(); ++axis) out[0].d[axis] = result[axis].expression();
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t place, const DynamicPluginTensorDesc* in_out, int32_t inputs,
                                   int32_t) noexcept override {
        return guarded(name_, false, [&] {
            node_->check_inputs(size_t(inputs));
            const PluginTensorDesc& desc = in_out[place].desc;
            const DataType first = in_out[0].desc.type;
            if (desc.format != TensorFormat::kLinear) return false;
            if (place == 0) return is_number(desc.type);
            if (place >= inputs) return desc.type == (node_->rules().chooses ? DataType::kInt64 : first);
            const std::string& name = node_->inputs()[place];
            if (contains(node_->rules().indices, name)) return is_index(desc.type);
            if (contains(node_->rules().widened, name)) return is_number(desc.type);
            return desc.type == first;
        });
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                            int32_t) const noexcept override {
        return guarded(name_, size_t(0), [&] { return measured(in, inputs); });
    }

    // --- running ---

    int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*,
                          int32_t) noexcept override {
        return 0;
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void* workspace, CUstream_st* stream) noexcept override {
        return guarded(name_, -1, [&] {
            std::vector<Tensor> tensors;
            for (size_t i = 0; i < node_->inputs().size(); ++i)
                tensors.push_back(tensor_of(in[i], in[i].dims, inputs[i]));
            const Call call(outputs[0], workspace, stream);
            node_->run(tensors);
            return 0;
        });
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    const PluginFieldCollection* getFieldsToSerialize() noexcept override { return fields_.collection(); }

  private:
    // Bytes of workspace that inputs of any size up to the largest take.
    size_t measured(const DynamicPluginTensorDesc* in, int32_t inputs) const {
        node_->check_inputs(size_t(inputs));
        std::vector<Tensor> tensors;
        for (int32_t i = 0; i < inputs; ++i) tensors.push_back(tensor_of(in[i].desc, in[i].max, nullptr));
        enlarge(*node_, tensors);
        const Call call;
        node_->run(tensors);
        return call.used();
    }

    const std::string name_;
    const std::shared_ptr<const Node> node_;
    const Fields fields_;
};

// --- creators ---

class Creator : public IPluginCreatorV3One {
  public:
    Creator(std::string operation, int number)
        : operation_(std::move(operation)), name_(name_of_variant(operation_, number)) {
        const Operator& rules = operators().at(operation_);
        const Boxed& function = registered().at(operation_);
        fields_.push_back({"inputs", nullptr, PluginFieldType::kChar, 1});
        for (size_t i = 0; i < rules.arguments.size(); ++i) {
            const char* const argument = rules.arguments[i].c_str();
            if (function.kinds[i] == Kind::kSizes)
                fields_.push_back({argument, nullptr, PluginFieldType::kInt64, 2});
            else if (function.kinds[i] == Kind::kInteger)
                fields_.push_back({argument, nullptr, PluginFieldType::kInt64, 1});
            else if (function.kinds[i] == Kind::kNumber)
                fields_.push_back({argument, nullptr, PluginFieldType::kFloat32, 1});
        }
        collection_ = {int32_t(fields_.size()), fields_.data()};
    }
    Creator(const Creator&) = delete;

    IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields,
                            TensorRTPhase) noexcept override {
        return guarded<IPluginV3*>(name_, nullptr, [&] {
            return new Plugin(name_, std::make_shared<const Node>(operation_, FieldAttributes(*fields)));
        });
    }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return name_.c_str(); }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    const std::string operation_, name_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_;
};

}  // namespace
}  // namespace vitrail::tensorrt

#define VITRAIL_EXPORT extern "C" __attribute__((visibility("default")))

// What TensorRT looks for in a plugin library.
VITRAIL_EXPORT nvinfer1::v_1_0::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    using namespace vitrail::tensorrt;
    using namespace vitrail::standalone;
    static const auto all = [] {
        std::vector<nvinfer1::v_1_0::IPluginCreatorInterface*> creators;
        static std::vector<std::unique_ptr<Creator>> owners;
        for (const auto& [name, rules] : operators())
            for (int number = 1; number <= kMostVariants; ++number)
                creators.push_back(owners.emplace_back(std::make_unique<Creator>(name, number)).get());
        return creators;
    }();
    count = int32_t(all.size());
    return all.data();
}

VITRAIL_EXPORT void setLoggerFinder(void*) {}

VITRAIL_EXPORT const char* vitrail_plugin_error() {
    return vitrail::tensorrt::last_error().c_str();
}
