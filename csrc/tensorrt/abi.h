// What TensorRT and a plugin agree on, as far as `IPluginV3` goes: layouts of structures, and the order of
// virtual functions. TensorRT's own headers come with its archives, not with its Python packages; this is the
// part of the interface that a plugin library needs, so that it can be built wherever nvcc is. Names are
// those of the interface, as they are part of it.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace nvinfer1 {

enum class DataType : int32_t { kFloat = 0, kHalf = 1, kInt32 = 3, kBFloat16 = 7, kInt64 = 8 };
enum class TensorFormat : int32_t { kLinear = 0 };
enum class DimensionOperation : int32_t { kSum, kProd, kMax, kMin, kSub, kEqual, kLess, kFloorDiv, kCeilDiv };
enum class PluginFieldType : int32_t {
    kFloat32 = 1,
    kFloat64 = 2,
    kInt32 = 5,
    kChar = 6,
    kUnknown = 8,
    kInt64 = 10
};
enum class TensorRTPhase : int32_t { kBuild = 0, kRuntime = 1 };
enum class PluginCapabilityType : int32_t { kCore = 0, kBuild = 1, kRuntime = 2 };
enum class APILanguage : int32_t { kCpp = 0 };

struct Dims {
    static constexpr int kMost = 8;
    int32_t count;
    int64_t d[kMost];
};

struct InterfaceInfo {
    const char* kind;
    int32_t major, minor;
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

// Sizes that a plugin must be ready for.
struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max, opt;
};

struct PluginField {
    const char* name;
    const void* data;
    PluginFieldType type;
    int32_t length;  // in entries
};

struct PluginFieldCollection {
    int32_t count;
    const PluginField* fields;
};

class IVersionedInterface {
  public:
    virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCpp; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

// --- sizes that are known at run time ---

class IDimensionExpr;

namespace apiv {

class VDimensionExpr {
  public:
    virtual ~VDimensionExpr() noexcept = default;
    virtual bool isConstant() const = 0;
    virtual int64_t getConstantValue() const = 0;
    virtual bool isSizeTensor() const = 0;
};

class VExprBuilder {
  public:
    virtual ~VExprBuilder() noexcept = default;
    virtual const IDimensionExpr* constant(int64_t value) = 0;
    virtual const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr& first,
                                            const IDimensionExpr& second) = 0;
    virtual const IDimensionExpr* declareSizeTensor(int32_t output, const IDimensionExpr& usual,
                                                    const IDimensionExpr& most) = 0;
};

}  // namespace apiv

class IDimensionExpr {
  protected:
    virtual ~IDimensionExpr() noexcept = default;

  public:
    apiv::VDimensionExpr* impl;
};

class IExprBuilder {
  protected:
    virtual ~IExprBuilder() noexcept = default;

  public:
    apiv::VExprBuilder* impl;
};

struct DimsExprs {
    int32_t count;
    const IDimensionExpr* d[Dims::kMost];
};

// --- plugins ---

namespace v_1_0 {

class IPluginCapability : public IVersionedInterface {};
class IPluginResourceContext;

class IPluginV3 : public IVersionedInterface {
  public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
  public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
    virtual const char* getPluginName() const noexcept = 0;
    virtual const char* getPluginVersion() const noexcept = 0;
    virtual const char* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
  public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
    virtual int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs,
                                    const DynamicPluginTensorDesc* out, int32_t outputs) noexcept = 0;
    virtual int32_t getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in,
                                       int32_t inputs) const noexcept = 0;
    virtual int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs* shape_inputs,
                                    int32_t shape_input_count, DimsExprs* out, int32_t outputs,
                                    IExprBuilder&) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t place, const DynamicPluginTensorDesc* in_out,
                                           int32_t inputs, int32_t outputs) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs,
                                    const DynamicPluginTensorDesc* out, int32_t outputs) const noexcept = 0;
    virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
    virtual int32_t getNbTactics() noexcept { return 0; }
    virtual const char* getTimingCacheID() noexcept { return nullptr; }
    virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
    virtual const char* getMetadataString() noexcept { return nullptr; }
};

class IPluginV3OneRuntime : public IPluginCapability {
  public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
    virtual int32_t setTactic(int32_t) noexcept { return 0; }
    virtual int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out,
                                  int32_t outputs) noexcept = 0;
    virtual int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out,
                            const void* const* inputs, void* const* outputs, void* workspace,
                            CUstream_st* stream) noexcept = 0;
    virtual IPluginV3* attachToContext(IPluginResourceContext*) noexcept = 0;
    virtual const PluginFieldCollection* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
  public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual IPluginV3* createPlugin(const char* name, const PluginFieldCollection*,
                                    TensorRTPhase) noexcept = 0;
    virtual const PluginFieldCollection* getFieldNames() noexcept = 0;
    virtual const char* getPluginName() const noexcept = 0;
    virtual const char* getPluginVersion() const noexcept = 0;
    virtual const char* getPluginNamespace() const noexcept = 0;
};

}  // namespace v_1_0
}  // namespace nvinfer1
