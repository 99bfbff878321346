// Ranks as threads of one process over one shared memory: what the sanitizers run.
#pragma once

#include <unistd.h>

#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/world/group.h"
#include "cpu/world/shared_memory.h"

namespace pyparallel::test {

// Runs body(group) on `size` threads, a rank each; a rank that throws fails the program.
template <class Body>
void run_ranks(int size, const std::string& name, Body body) {
  const int64_t bytes = cpu::Group::shared_bytes(size);
  const int memory = cpu::create_shared_memory(bytes);
  // One mapping for all: the sanitizers know memory by its address.
  const auto mapping = std::make_shared<cpu::Mapping>(memory, 0, bytes);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        cpu::Group group(name, rank, size, dup(memory), std::vector<int>(size_t(size), -1),
                         mapping);
        group.waiter().timeout_s = 60;
        body(group);
      } catch (const std::exception& error) {
        fail(name + ", rank " + std::to_string(rank) + ": " + error.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  close(memory);
}

}  // namespace pyparallel::test
