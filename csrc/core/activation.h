// The activations of a transformer's MLP, numbered once for all kernels; Python reads the table from the
// extension that it calls.
#pragma once

#include <cstdint>

namespace pyparallel {

#define PP_ACTIVATIONS(X) X(none) X(relu) X(silu) X(gelu) X(gelu_tanh)

#define PP_ENTRY(name) name,
enum class Activation : int32_t { PP_ACTIVATIONS(PP_ENTRY) };
#undef PP_ENTRY

// By number.
#define PP_ENTRY(name) #name,
constexpr const char* kActivationNames[] = {PP_ACTIVATIONS(PP_ENTRY)};
#undef PP_ENTRY
constexpr int kActivations = sizeof kActivationNames / sizeof *kActivationNames;

}  // namespace pyparallel
