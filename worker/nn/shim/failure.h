// How a C++ exception, or an error of a Rust callback inside libtorch, crosses back into Rust.
#pragma once

#include <cstring>
#include <exception>
#include <memory>
#include <utility>

namespace lockstep {

// Frees a Rust error that nobody took.
using DropError = void (*)(void* error);

// Written by every fallible function of the shim. At most one of the two is set.
struct Failure {
  char* message;         // of libtorch, from malloc; the caller frees it
  void* callback_error;  // a Rust error, handed back to its owner
};

// An error that a Rust callback returned. It travels through libtorch's engine as an exception and keeps its type.
class CallbackError : public std::exception {
 public:
  CallbackError(void* error, DropError drop) : slot_(std::make_shared<Slot>(error, drop)) {}

  const char* what() const noexcept override { return "a Lockstep callback failed"; }

  // The error itself, once; null afterwards.
  void* take() const { return std::exchange(slot_->error, nullptr); }

 private:
  struct Slot {
    void* error;
    DropError drop;
    Slot(void* error, DropError drop) : error(error), drop(drop) {}
    Slot(const Slot&) = delete;
    Slot& operator=(const Slot&) = delete;
    ~Slot() {
      if (error != nullptr) drop(error);
    }
  };
  // Exceptions are copied; the error is not.
  std::shared_ptr<Slot> slot_;
};

// Runs `body`; true if it threw nothing.
template <class Body>
bool guarded(Failure* failure, Body&& body) noexcept {
  try {
    body();
    return true;
  } catch (const CallbackError& e) {
    failure->callback_error = e.take();
  } catch (const std::exception& e) {
    failure->message = strdup(e.what());
  } catch (...) {
    failure->message = strdup("an exception that is not a std::exception");
  }
  return false;
}

}  // namespace lockstep
