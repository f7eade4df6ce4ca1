// What TensorRT asks of the results of operators: their sizes, written in those of the inputs.
#pragma once

#include "../standalone/operators.h"
#include "abi.h"

namespace vitrail::tensorrt {

// Builds sizes that are known at run time out of those of the inputs.
class Size {
  public:
    Size(nvinfer1::IExprBuilder& builder, const nvinfer1::IDimensionExpr* expression)
        : builder_(&builder), expression_(expression) {}
    Size(nvinfer1::IExprBuilder& builder, int64_t value) : Size(builder, builder.impl->constant(value)) {}

    const nvinfer1::IDimensionExpr* expression() const { return expression_; }
    Size times(const Size& other) const { return with(nvinfer1::DimensionOperation::kProd, other); }
    Size at_most(int64_t limit) const {
        return with(nvinfer1::DimensionOperation::kMin, Size(*builder_, limit));
    }
    Size pieces_of(const Size& size) const { return with(nvinfer1::DimensionOperation::kCeilDiv, size); }
    Size pieces_of(int64_t size) const { return pieces_of(Size(*builder_, size)); }

  private:
    Size with(nvinfer1::DimensionOperation operation, const Size& other) const {
        return {*builder_, builder_->impl->operation(operation, *expression_, *other.expression_)};
    }

    nvinfer1::IExprBuilder* builder_;
    const nvinfer1::IDimensionExpr* expression_;
};

// A call at build time: sizes of the given inputs by name, and settings.
struct Shapes {
    nvinfer1::IExprBuilder& builder;
    std::map<std::string, std::vector<Size>> inputs;
    std::map<std::string, standalone::Value> settings;

    bool has(const std::string& name) const { return inputs.count(name) > 0; }
    // Throw std::invalid_argument where the node has no such input, size or setting.
    Size size(const std::string& name, size_t axis) const;
    const standalone::Value& setting(const std::string& name) const;
};

// Of the result of an operator.
std::vector<Size> result_of(const std::string& operation, const Shapes&);

}  // namespace vitrail::tensorrt
