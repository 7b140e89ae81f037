// flashmoe._native: the C++ core as Python sees it.  Arguments are checked here, never in the kernels.
#include <nanobind/nanobind.h>

namespace flashmoe {
void bind_kernels(nanobind::module_& m);
void bind_float(nanobind::module_& m);
void bind_io(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);
}  // namespace flashmoe

NB_MODULE(_native, m) {
  flashmoe::bind_kernels(m);
  flashmoe::bind_float(m);
  flashmoe::bind_io(m);
  flashmoe::bind_sampler(m);
}
