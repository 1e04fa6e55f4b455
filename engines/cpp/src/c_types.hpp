// The handles and conversions that the parts of the C API share.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "qwenport/qwenport.h"
#include "qwenport/qwenport.hpp"

struct qwenport_engine {
  qwenport::Engine engine;
  std::string gpus;
};

struct qwenport_cancellation {
  qwenport::Cancellation cancellation;
};

namespace qwenport::detail {

/// \param name of the argument, for messages. \throws Error invalid_argument: a row that is not empty is NULL.
std::vector<std::vector<Token>> rows_of(const int64_t* const* rows, const size_t* sizes, size_t count,
                                        const std::string& name);

/// \param user where on_logits finds its `user` when it is called. \throws Error invalid_argument: a list is NULL.
GenerateOptions options_of(const qwenport_generate_options& given, void* const* user);

/// A copy for the caller, with a zero behind it, to be freed with std::free.
template <typename T>
T* copied(const T* values, std::size_t count) {
  auto* copy = static_cast<T*>(std::calloc(count + 1, sizeof(T)));
  if (copy == nullptr) throw std::bad_alloc();
  if (count != 0) std::memcpy(copy, values, count * sizeof(T));
  return copy;
}

}  // namespace qwenport::detail
