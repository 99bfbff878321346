// How a file of this folder adds its functions to the module: it holds a Binding, and no list names it.
#pragma once

#include <pybind11/pybind11.h>

namespace pyparallel {

// `const Binding binding([](pybind11::module_& m) { m.def(...); });`
class Binding {
 public:
  using Bind = void (*)(pybind11::module_&);

  explicit Binding(Bind bind) : bind_(bind), next_(first()) { first() = this; }

  static void all(pybind11::module_& m) {
    for (const Binding* binding = first(); binding != nullptr; binding = binding->next_) {
      binding->bind_(m);
    }
  }

 private:
  // Made by the first file's Binding, whichever that is.
  static const Binding*& first() {
    static const Binding* head = nullptr;
    return head;
  }

  Bind bind_;
  const Binding* next_;
};

}  // namespace pyparallel
