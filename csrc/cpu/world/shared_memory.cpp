#include "cpu/world/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace pyparallel::cpu {
namespace {

[[noreturn]] void fail(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

int create_shared_memory(int64_t bytes) {
  const int descriptor = memfd_create("pyparallel", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) fail("shared memory: memfd_create");
  // A peer that shrank the memory could end this process by SIGBUS.
  if (fchmod(descriptor, 0600) != 0 || ftruncate(descriptor, bytes) != 0 ||
      fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    const int error = errno;
    close(descriptor);
    errno = error;
    fail("shared memory: cannot prepare a new one");
  }
  return descriptor;
}

Mapping::Mapping(int descriptor, int64_t offset, int64_t bytes) : bytes_(bytes) {
  void* address =
      mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, offset);
  if (address == MAP_FAILED) fail("shared memory: mmap");
  data_ = static_cast<unsigned char*>(address);
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, size_t(bytes_));
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void grow_shared_memory(int descriptor, int64_t bytes) {
  struct stat status{};
  if (fstat(descriptor, &status) != 0) fail("shared memory: fstat");
  // Two ranks that both see the old length truncate to the same new one; a third that is ahead may
  // have grown it further, and then the seal turns the shrinking into an error to be ignored.
  if (status.st_size < bytes && ftruncate(descriptor, bytes) != 0 && errno != EPERM) {
    fail("shared memory: cannot grow");
  }
}

}  // namespace pyparallel::cpu
