#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

#include "flashmoe/reader.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

// Python holds the buffer through this handle, reads in flight through the shared pointer inside.
struct BufferHandle {
  std::shared_ptr<AlignedBuffer> buffer;
};

DirectMode parse_mode(const std::string& mode) {
  if (mode == "auto") return DirectMode::automatic;
  if (mode == "on") return DirectMode::on;
  if (mode == "off") return DirectMode::off;
  throw std::invalid_argument("direct must be auto, on or off");
}

EngineKind parse_engine(const std::string& engine) {
  if (engine == "auto") return EngineKind::automatic;
  if (engine == "threads") return EngineKind::threads;
  if (engine == "uring") return EngineKind::uring;
  throw std::invalid_argument("engine must be auto, threads or uring");
}

nb::list to_list(const std::vector<Completion>& completions) {
  nb::list out;
  for (const Completion& completion : completions)
    out.append(nb::make_tuple(completion.tag, completion.error));
  return out;
}

// Blocks in slices, so that Ctrl-C is noticed while the drive hangs.
nb::list wait(Reader& reader) {
  std::vector<Completion> completions;
  for (;;) {
    {
      nb::gil_scoped_release release;
      completions = reader.wait(std::chrono::milliseconds(100));
    }
    if (!completions.empty() || reader.outstanding() == 0) break;
    // Only with nothing in hand: an exception here would lose completions.
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
  return to_list(completions);
}

}  // namespace

void bind_io(nb::module_& m) {
  nb::class_<BufferHandle>(m, "AlignedBuffer")
      .def(
          "__init__",
          [](BufferHandle* self, size_t nbytes, bool huge) {
            new (self) BufferHandle{std::make_shared<AlignedBuffer>(nbytes, huge)};
          },
          "nbytes"_a, "huge"_a)
      .def_prop_ro("nbytes", [](const BufferHandle& self) { return self.buffer->nbytes(); })
      .def_prop_ro("address",
                   [](const BufferHandle& self) { return reinterpret_cast<uintptr_t>(self.buffer->data()); })
      .def("array", [](BufferHandle& self) {
        // The array's owner is a second reference to the mapping: it may outlive the handle.
        auto* keep = new std::shared_ptr<AlignedBuffer>(self.buffer);
        nb::capsule owner(keep,
                          [](void* p) noexcept { delete static_cast<std::shared_ptr<AlignedBuffer>*>(p); });
        return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(self.buffer->data(), {self.buffer->nbytes()},
                                                            owner);
      });
  nb::class_<Reader>(m, "Reader")
      .def(
          "__init__",
          [](Reader* self, const std::vector<std::string>& paths, const std::string& direct,
             const std::string& engine, int queue_depth) {
            try {
              new (self) Reader(paths, parse_mode(direct), parse_engine(engine), queue_depth);
            } catch (const std::system_error& error) {
              throw std::invalid_argument(error.what());
            }
          },
          "paths"_a, "direct"_a, "engine"_a, "queue_depth"_a)
      .def(
          "submit",
          [](Reader& self, size_t file, uint64_t offset, size_t nbytes, const BufferHandle& buffer,
             size_t buffer_offset, int64_t tag, bool prefetch) {
            self.submit({file, offset, nbytes, buffer.buffer, buffer_offset, tag, prefetch});
          },
          "file"_a, "offset"_a, "nbytes"_a, "buffer"_a, "buffer_offset"_a, "tag"_a, "prefetch"_a = false)
      .def("wait", &wait)
      .def("poll", [](Reader& self) { return to_list(self.wait(std::chrono::milliseconds(0))); })
      .def("withdraw", &Reader::withdraw)
      .def_prop_ro("outstanding", &Reader::outstanding)
      .def_prop_ro("direct", &Reader::direct)
      .def_prop_ro("direct_reason", &Reader::direct_reason)
      .def_prop_ro("engine",
                   [](const Reader& self) {
                     return std::string(self.engine() == EngineKind::uring ? "uring" : "threads");
                   })
      .def_prop_ro("engine_reason", &Reader::engine_reason)
      .def("stats", [](const Reader& self) {
        const ReaderStats stats = self.stats();
        return nb::make_tuple(stats.reads, stats.nbytes, stats.busy_seconds, stats.max_in_flight);
      });
}

}  // namespace flashmoe
