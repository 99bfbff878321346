// What Python's SharedMemoryGroup holds; shared by the areas that take one.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <initializer_list>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpu/world/group.h"

namespace pyparallel {

// Gives the interpreter lock away while a call is long, and lets only one thread at a time in.
class PythonGroup {
 public:
  PythonGroup(std::string name, int rank, int size, int memory_descriptor,
              std::vector<int> process_descriptors, double timeout_s)
      : group(std::move(name), rank, size, memory_descriptor, std::move(process_descriptors)) {
    group.waiter().timeout_s = timeout_s;
    group.waiter().hooks = {
        [this] {
          if (!released_) thread_ = PyEval_SaveThread();
        },
        [this] {
          if (!released_) PyEval_RestoreThread(std::exchange(thread_, nullptr));
        },
        [this] {
          PyEval_RestoreThread(std::exchange(thread_, nullptr));
          const bool interrupted = PyErr_CheckSignals() != 0;
          thread_ = PyEval_SaveThread();
          return interrupted;
        },
    };
  }

  template <class Body>
  void run(Body body) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      pybind11::gil_scoped_release release;
      lock.lock();
    }
    body(group);
  }

  // As run(), with the interpreter lock given away throughout.
  template <class Body>
  void run_released(Body body);

  cpu::Group group;

 private:
  friend class Released;
  std::mutex mutex_;
  PyThreadState* thread_ = nullptr;
  bool released_ = false;
};

// While one lives, the interpreter lock is given away and its groups, those that are not null, are this
// thread's.
class Released {
 public:
  explicit Released(std::initializer_list<PythonGroup*> groups) : thread_(PyEval_SaveThread()) {
    for (PythonGroup* group : groups) {
      if (group == nullptr) continue;
      group->mutex_.lock();
      group->thread_ = thread_;
      group->released_ = true;
      groups_.push_back(group);
    }
  }
  ~Released() {
    for (PythonGroup* group : groups_) {
      group->released_ = false;
      group->thread_ = nullptr;
      group->mutex_.unlock();
    }
    PyEval_RestoreThread(thread_);
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* thread_;
  std::vector<PythonGroup*> groups_;
};

template <class Body>
void PythonGroup::run_released(Body body) {
  Released released({this});
  body(group);
}

// Sets the Python error for what a call of a group threw.
void set_python_error(std::exception_ptr thrown);

// The functions that collectives_fast.cpp makes for a SharedMemoryGroup.
void bind_fast_collectives(pybind11::module_& m);

}  // namespace pyparallel
