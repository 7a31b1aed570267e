// A device that computes on the CPU, and that refuses what a GPU refuses: arrays of two devices.

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
const c10::Device DEVICE(c10::DeviceType::PrivateUse1, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, DEVICE);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
const bool HOOKED = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

// The same memory, as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& x) {
  if (x.is_cpu()) return x;
  return at::for_blob(x.data_ptr(), x.sizes())
      .strides(x.strides())
      .options(at::TensorOptions().dtype(x.scalar_type()).device(at::kCPU))
      .target_device(at::kCPU)
      .make_tensor();
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS,
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

// A GPU has no code for these that sums in one order only, where a program asks for that.
const std::set<std::string> IN_ANY_ORDER = {"aten::cumsum", "aten::cumsum_"};

void refuse_any_order(const c10::OperatorHandle& op, const at::Tensor& x) {
  const std::string& name = op.schema().name();
  TORCH_CHECK(!at::globalContext().deterministicAlgorithms() || !IN_ANY_ORDER.count(name) ||
                  !x.is_floating_point(),
              name, " of floating-point numbers is not deterministic on a GPU");
}

// Computes on the CPU. A GPU ends its process for an index out of range, so that no test may use one.
void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  try {
    at::native::cpu_fallback(op, stack);
  } catch (const c10::Error& error) {
    const std::string said = error.what_without_backtrace();
    const bool index = said.find("index") != std::string::npos;
    const bool outside = said.find("out of range") != std::string::npos ||
                         said.find("out of bounds") != std::string::npos;
    TORCH_CHECK(!(index && outside), "device-side assert triggered, which a GPU does not survive: ",
                said);
    throw;
  }
}

// Numbers of the CPU may take part, as they may on a GPU, and indices in brackets; arrays may not.
void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto check = [&](const at::Tensor& x) {
    TORCH_CHECK(!x.defined() || !x.is_cpu() || x.dim() == 0,
                "Expected all tensors to be on the same device: ", op.schema().name(),
                " got an array of the CPU beside one of the stand-in");
  };
  for (const c10::IValue& x : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (x.isTensor()) {
      check(x.toTensor());
      refuse_any_order(op, x.toTensor());
    }
    if (x.isTensorList())
      for (const at::Tensor& each : x.toTensorVector()) check(each);
  }
  compute(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", [](at::Tensor& x, at::Storage y) -> at::Tensor& {
    return at::native::set_(x, std::move(y));
  });
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_", &at::native::set_cpu_);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>());
}

}  // namespace
