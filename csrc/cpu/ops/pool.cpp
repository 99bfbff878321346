#include "cpu/ops/pool.h"

namespace pyparallel::cpu {

Pool& Pool::instance() {
  // Never destroyed: at exit its threads may already be gone.
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace pyparallel::cpu
