// Anonymous shared memory: it has no name, so nothing can be left behind; it lives as long as a
// process has it mapped or open. Backed by a memfd, so a small /dev/shm is no limit, and pages are
// given only when touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyparallel::cpu {

// An open descriptor of a new memory of `bytes` zeros, readable and writable by this user alone
// (mode 0600), which cannot be shrunk. The caller closes it.
// Throws std::system_error.
int create_shared_memory(int64_t bytes);

// A range of a shared memory, mapped while the object lives.
class Mapping {
 public:
  Mapping() = default;
  // Throws std::system_error.
  Mapping(int descriptor, int64_t offset, int64_t bytes);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  unsigned char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Makes the memory at least `bytes` long. Ranks may race: it only grows.
void grow_shared_memory(int descriptor, int64_t bytes);

}  // namespace pyparallel::cpu
