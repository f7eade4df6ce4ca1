// A stand-in for TensorRT, for tests without a GPU: takes a plugin from creation over serialisation and the
// questions of a build to a run on host memory. It knows plugins through csrc/tensorrt/abi.h alone.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/tensorrt/abi.h"

using namespace nvinfer1;
using namespace nvinfer1::v_1_0;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t&);
extern "C" const char* vitrail_plugin_error();

namespace {

class Number : public IDimensionExpr, public apiv::VDimensionExpr {
  public:
    explicit Number(int64_t value) : value_(value) { impl = this; }
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

  private:
    int64_t value_;
};

class Builder : public IExprBuilder, public apiv::VExprBuilder {
  public:
    Builder() { impl = this; }
    const IDimensionExpr* constant(int64_t value) override {
        return numbers_.emplace_back(std::make_unique<Number>(value)).get();
    }
    const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                    const IDimensionExpr& second) override {
        const int64_t a = first.impl->getConstantValue(), b = second.impl->getConstantValue();
        if (op == DimensionOperation::kProd) return constant(a * b);
        if (op == DimensionOperation::kMin) return constant(a < b ? a : b);
        if (op == DimensionOperation::kCeilDiv) return constant((a + b - 1) / b);
        return nullptr;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
        return nullptr;
    }

  private:
    std::vector<std::unique_ptr<Number>> numbers_;
};

struct Build {
    IPluginV3OneBuild* build;
    IPluginV3OneRuntime* runtime;

    explicit Build(IPluginV3* plugin)
        : build(
              static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBuild))),
          runtime(static_cast<IPluginV3OneRuntime*>(
              plugin->getCapabilityInterface(PluginCapabilityType::kRuntime))) {}
};

int failed(const char* what, char* message, int size) {
    std::snprintf(message, size_t(size), "%s: %s", what, vitrail_plugin_error());
    return 1;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int plugin_count() {
    int32_t count = 0;
    getCreators(count);
    return count;
}

EXPORT const char* plugin_name(int i) {
    int32_t count = 0;
    return static_cast<IPluginCreatorV3One*>(getCreators(count)[i])->getPluginName();
}

// Runs a plugin on inputs of the given sizes, with the workspace that it asked for where sizes go up to
// `most`. `result` has room for `room` bytes; its sizes and type come back. Returns 0, or 1 and a message.
EXPORT int run_plugin(const char* name, const PluginField* fields, int field_count,
                      const PluginTensorDesc* in, const Dims* most, int inputs, const void* const* data,
                      void* result, int64_t room, PluginTensorDesc* out, int64_t* workspace_bytes,
                      char* message, int message_size) {
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < count; ++i) {
        auto* const candidate = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(candidate->getPluginName(), name) == 0) creator = candidate;
    }
    if (!creator) return failed("no such plugin", message, message_size);
    const PluginFieldCollection given = {field_count, fields};
    const std::unique_ptr<IPluginV3> made(creator->createPlugin(name, &given, TensorRTPhase::kBuild));
    if (!made) return failed("creation", message, message_size);
    const std::unique_ptr<IPluginV3> plugin(made->clone());
    IPluginV3OneBuild* const build = Build(plugin.get()).build;
    const auto is = [](const IVersionedInterface& interface, const char* kind) {
        return std::strcmp(interface.getInterfaceInfo().kind, kind) == 0;
    };
    if (!is(*plugin, "PLUGIN") || !is(*build, "PLUGIN_V3ONE_BUILD") ||
        !is(*Build(plugin.get()).runtime, "PLUGIN_V3ONE_RUNTIME"))
        return failed("an interface of another kind", message, message_size);

    Builder builder;
    std::vector<DimsExprs> sizes(inputs);
    std::vector<DataType> types(inputs);
    std::vector<DynamicPluginTensorDesc> descs(inputs + 1);
    for (int i = 0; i < inputs; ++i) {
        sizes[i].count = in[i].dims.count;
        for (int axis = 0; axis < in[i].dims.count; ++axis)
            sizes[i].d[axis] = builder.constant(in[i].dims.d[axis]);
        types[i] = in[i].type;
        descs[i] = {in[i], in[i].dims, most[i], most[i]};
    }
    DimsExprs result_sizes = {};
    if (build->getOutputShapes(sizes.data(), inputs, nullptr, 0, &result_sizes, 1, builder))
        return failed("sizes of the result", message, message_size);
    *out = {};
    if (build->getOutputDataTypes(&out->type, 1, types.data(), inputs))
        return failed("type of the result", message, message_size);
    out->dims.count = result_sizes.count;
    int64_t bytes = out->type == DataType::kInt64 ? 8 : out->type == DataType::kFloat ? 4 : 2;
    for (int axis = 0; axis < result_sizes.count; ++axis)
        bytes *= out->dims.d[axis] = result_sizes.d[axis]->impl->getConstantValue();
    if (bytes > room) return failed("the result is larger than expected", message, message_size);
    descs[inputs] = {*out, out->dims, out->dims, out->dims};
    for (int i = 0; i <= inputs; ++i)
        if (!build->supportsFormatCombination(i, descs.data(), inputs, 1))
            return failed(("type of tensor " + std::to_string(i)).c_str(), message, message_size);
    if (build->configurePlugin(descs.data(), inputs, &descs[inputs], 1))
        return failed("configuration", message, message_size);
    *workspace_bytes = int64_t(build->getWorkspaceSize(descs.data(), inputs, &descs[inputs], 1));

    // An engine holds the plugin's fields, and makes another one of them.
    const std::unique_ptr<IPluginV3> loaded(creator->createPlugin(
        name, Build(plugin.get()).runtime->getFieldsToSerialize(), TensorRTPhase::kRuntime));
    if (!loaded) return failed("creation from an engine", message, message_size);
    const std::unique_ptr<IPluginV3> attached(Build(loaded.get()).runtime->attachToContext(nullptr));
    IPluginV3OneRuntime* const runtime = Build(attached.get()).runtime;
    if (runtime->onShapeChange(in, inputs, out, 1)) return failed("change of sizes", message, message_size);
    // What lies past the workspace must stay as it is; what is in it is not zero.
    constexpr size_t kGuard = 4096;
    std::vector<unsigned char> memory(size_t(*workspace_bytes) + kGuard + 256, 0xff);
    auto* const workspace =
        reinterpret_cast<unsigned char*>((uintptr_t(memory.data()) + 255) & ~uintptr_t(255));
    if (runtime->enqueue(in, out, data, &result, workspace, nullptr))
        return failed("run", message, message_size);
    for (const unsigned char* p = workspace + *workspace_bytes; p < memory.data() + memory.size(); ++p)
        if (*p != 0xff) return failed("the workspace was left", message, message_size);
    return 0;
}
