// A node of an ONNX file: an operator with its settings, and the names of the tensors that it is given.
#pragma once

#include "operators.h"

namespace vitrail::standalone {

// What a runtime knows of a node's attributes. They throw std::invalid_argument where there is none, or where
// it is of another kind.
class Attributes {
  public:
    virtual ~Attributes() = default;
    virtual std::string text(const std::string& name) const = 0;
    virtual std::vector<int64_t> integers(const std::string& name) const = 0;
    virtual int64_t integer(const std::string& name) const = 0;
    virtual double number(const std::string& name) const = 0;
};

bool contains(const std::vector<std::string>& names, const std::string& name);

// How many of `size` cover `n`.
int64_t quotient(int64_t n, int64_t size);

class Node {
  public:
    Node(const std::string& operation, const Attributes& attributes);

    const std::string& operation() const { return operation_; }
    const Operator& rules() const { return operator_; }
    const std::vector<std::string>& inputs() const { return inputs_; }
    const std::map<std::string, Value>& settings() const { return settings_; }

    // Of one of its settings.
    Kind kind_of(const std::string& setting) const;

    void check_inputs(size_t count) const;

    // Runs the operator on tensors in the order of `inputs`, inside a call.
    void run(const std::vector<Tensor>& tensors) const;

  private:
    void read_inputs(const std::string& text);

    // Settings in which a negative size, the number of pieces that a grid is cut into, is the size of these,
    // and a negative number, the most regions that may be chosen, is how many there are to choose.
    std::map<std::string, Value> resolved(const std::vector<Tensor>& tensors) const;

    const std::string operation_;
    const Operator& operator_;
    const Boxed& function_;
    std::vector<std::string> inputs_;
    std::map<std::string, Value> settings_;
};

}  // namespace vitrail::standalone
