// A whole decoder of one rank as a Python object: pyparallel/decoding/cpu_decoder.py gives it the addresses of a
// model's tensors and keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings/addresses.h"
#include "bindings/bindings.h"
#include "bindings/python_group.h"
#include "cpu/decoder/decoder.h"
#include "cpu/decoder/group_peers.h"

namespace py = pybind11;

namespace pyparallel {
namespace {

using namespace cpu;

Norm norm_of(const std::pair<uintptr_t, uintptr_t>& addresses) {
  return {pointer<const float>(addresses.first), pointer<const float>(addresses.second)};
}

template <class T>
T field(const py::dict& from, const char* name) {
  if (!from.contains(name)) throw py::key_error(name);
  return from[name].cast<T>();
}

DecoderShape shape_of(const py::dict& d) {
  DecoderShape s{};
  s.hidden = field<int64_t>(d, "hidden");
  s.heads = field<int64_t>(d, "heads");
  s.kv_heads = field<int64_t>(d, "kv_heads");
  s.head_dim = field<int64_t>(d, "head_dim");
  s.rotary_dim = field<int64_t>(d, "rotary_dim");
  s.intermediate = field<int64_t>(d, "intermediate");
  s.vocab_size = field<int64_t>(d, "vocab_size");
  s.vocab_begin = field<int64_t>(d, "vocab_begin");
  s.vocab_rows = field<int64_t>(d, "vocab_rows");
  s.eps = field<float>(d, "eps");
  s.softmax_scale = field<float>(d, "softmax_scale");
  s.gated = field<bool>(d, "gated");
  s.parallel_residual = field<bool>(d, "parallel_residual");
  s.activation = Activation(field<int>(d, "activation"));
  s.cache_precision = Precision(field<int>(d, "cache_precision"));
  s.bf16_compute = field<bool>(d, "bf16_compute");
  return s;
}

using NormTuple = std::pair<uintptr_t, uintptr_t>;

DecoderLayer layer_of(const py::dict& d) {
  DecoderLayer layer;
  layer.attention_norm = norm_of(field<NormTuple>(d, "attention_norm"));
  layer.qkv = weight_of(field<WeightTuple>(d, "qkv"));
  layer.q_norm = pointer<const float>(field<uintptr_t>(d, "q_norm"));
  layer.k_norm = pointer<const float>(field<uintptr_t>(d, "k_norm"));
  layer.out = weight_of(field<WeightTuple>(d, "out"));
  layer.mlp_norm = norm_of(field<NormTuple>(d, "mlp_norm"));
  layer.up = weight_of(field<WeightTuple>(d, "up"));
  layer.down = weight_of(field<WeightTuple>(d, "down"));
  layer.window = field<int64_t>(d, "window");
  return layer;
}

class PythonDecoder {
 public:
  PythonDecoder(const py::dict& shape, const py::dict& weights, PythonGroup* group,
                PythonGroup* context, int threads, std::vector<int> cores)
      : group_(group), context_(context) {
    const DecoderShape s = shape_of(shape);
    DecoderWeights w;
    w.embedding = weight_of(field<WeightTuple>(weights, "embedding"));
    w.positions = pointer<const float>(field<uintptr_t>(weights, "positions"));
    w.final_norm = norm_of(field<NormTuple>(weights, "final_norm"));
    w.head = weight_of(field<WeightTuple>(weights, "head"));
    for (const py::handle layer : field<py::list>(weights, "layers")) {
      w.layers.push_back(layer_of(layer.cast<py::dict>()));
    }
    auto team = std::make_shared<Team>(threads, std::move(cores));
    std::shared_ptr<Peers> peers = peers_of(group_, Decoder::exchange_bytes(s));
    std::shared_ptr<Peers> others = peers_of(context_, Decoder::context_bytes(s));
    decoder_ = std::make_unique<Decoder>(s, std::move(w), std::move(peers), std::move(team),
                                         std::move(others));
  }

  template <class Body>
  void run(Body body) {
    Released released({group_, context_});
    body(*decoder_);
  }

  Decoder& decoder() { return *decoder_; }

 private:
  static std::shared_ptr<Peers> peers_of(PythonGroup* group, int64_t bytes) {
    std::shared_ptr<Peers> peers;
    if (group == nullptr) return peers;
    group->run_released([&](Group& g) {
      if (g.size() > 1) peers = std::make_shared<GroupPeers>(g, bytes);
    });
    return peers;
  }

  PythonGroup* group_;
  PythonGroup* context_;
  std::unique_ptr<Decoder> decoder_;
};

std::vector<int64_t> greedy(Decoder& decoder) {
  std::vector<int64_t> tokens(size_t(decoder.logit_rows()));
  decoder.greedy(tokens.data());
  return tokens;
}

}  // namespace

static void bind_decode(py::module_& m) {
  py::class_<PythonDecoder>(m, "Decoder", "One rank's share of a decoder; a call a token.")
      .def(py::init<const py::dict&, const py::dict&, PythonGroup*, PythonGroup*, int,
                    std::vector<int>>(),
           py::arg("shape"), py::arg("weights"), py::arg("group"), py::arg("context"),
           py::arg("threads"), py::arg("cores"), py::keep_alive<1, 4>(), py::keep_alive<1, 5>())
      .def(
          "use_cache",
          [](PythonDecoder& self, int64_t batch, int64_t slots, const std::vector<uintptr_t>& keys,
             const std::vector<uintptr_t>& values, uintptr_t cos, uintptr_t sin, int64_t length,
             uintptr_t positions) {
            DecoderCache cache;
            cache.batch = batch;
            cache.slots = slots;
            for (const uintptr_t address : keys) cache.keys.push_back(pointer(address));
            for (const uintptr_t address : values) cache.values.push_back(pointer(address));
            cache.cos = pointer<const float>(cos);
            cache.sin = pointer<const float>(sin);
            cache.length = length;
            cache.positions = pointer<const int64_t>(positions);
            self.decoder().use_cache(std::move(cache));
          },
          py::arg("batch"), py::arg("slots"), py::arg("keys"), py::arg("values"), py::arg("cos"),
          py::arg("sin"), py::arg("length"), py::arg("positions"))
      .def(
          "prefill",
          [](PythonDecoder& self, const std::vector<int64_t>& tokens, int64_t row, int64_t start) {
            self.run(
                [&](Decoder& d) { d.prefill(tokens.data(), int64_t(tokens.size()), row, start); });
          },
          py::arg("tokens"), py::arg("row"), py::arg("start"),
          "Append tokens to a sequence; leaves the logits after the last.")
      .def(
          "decode",
          [](PythonDecoder& self, const std::vector<int64_t>& tokens,
             const std::vector<int64_t>& rows, const std::vector<int64_t>& positions) {
            if (rows.size() != tokens.size() || positions.size() != tokens.size()) {
              throw std::invalid_argument("rows, positions: expected one for each token");
            }
            self.run([&](Decoder& d) {
              d.decode(tokens.data(), rows.data(), positions.data(), int64_t(tokens.size()));
            });
          },
          py::arg("tokens"), py::arg("rows"), py::arg("positions"),
          "One token for each of some sequences; leaves the logits after each.")
      .def(
          "greedy",
          [](PythonDecoder& self) {
            std::vector<int64_t> next;
            self.run([&](Decoder& d) { next = greedy(d); });
            return next;
          },
          "The likeliest token of each row of logits, over all ranks; of equal ones the lowest.")
      .def_property_readonly(
          "logits",
          [](PythonDecoder& self) {
            const float* logits = nullptr;
            self.run([&](Decoder& d) { logits = d.logits(); });
            return reinterpret_cast<uintptr_t>(logits);
          },
          "Where they lie; a call of all context ranks.")
      .def_property_readonly("logit_rows",
                             [](PythonDecoder& self) { return self.decoder().logit_rows(); });
}

static const Binding binding(bind_decode);

}  // namespace pyparallel
