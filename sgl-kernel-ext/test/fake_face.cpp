// The fake driver for Python: with the host's side of the resident loop it makes a library that
// crosspool/kernels/cuda_loop.py drives where there is no GPU (test/support/fake_cuda_graphs.py).
#include <crosspool/export.h>

#include "fake_driver.h"

extern "C" {

CROSSPOOL_API void* crosspool_fake_graph(void (*body)(), int ticks);
CROSSPOOL_API void crosspool_fake_add_node(void* graph, int type, void* child);
CROSSPOOL_API void crosspool_fake_remove_nodes(void* graph);
CROSSPOOL_API void crosspool_fake_destroy_graph(void* graph);
CROSSPOOL_API void crosspool_fake_run(int units);
CROSSPOOL_API void crosspool_fake_connections(unsigned count);
CROSSPOOL_API void* crosspool_fake_stream();
CROSSPOOL_API void crosspool_fake_destroy_stream(void* stream);
CROSSPOOL_API void crosspool_fake_turn(int knob);
CROSSPOOL_API void crosspool_fake_fail_call(const char* name, int successes, int error);
CROSSPOOL_API void crosspool_fake_fail_tail_launch(int error);
CROSSPOOL_API void crosspool_fake_fail_relaunch(int error);
CROSSPOOL_API void crosspool_fake_fault_stage();
CROSSPOOL_API const char* crosspool_fake_violation(unsigned index);  // null: there is none
CROSSPOOL_API unsigned crosspool_fake_live();
CROSSPOOL_API void crosspool_fake_reset();
}

void* crosspool_fake_graph(void (*body)(), int ticks) {
  return crosspool::fake::make_graph(body, ticks);
}

void crosspool_fake_add_node(void* graph, int type, void* child) {
  crosspool::fake::add_node(graph, type, child);
}

void crosspool_fake_remove_nodes(void* graph) { crosspool::fake::remove_nodes(graph); }

void crosspool_fake_destroy_graph(void* graph) { crosspool::fake::destroy_graph(graph); }

void crosspool_fake_run(int units) { crosspool::fake::run(units); }

void crosspool_fake_connections(unsigned count) { crosspool::fake::connections(count); }

void* crosspool_fake_stream() {
  crosspool::gpu::Stream stream = nullptr;
  crosspool::gpu::calls().stream_create(&stream);
  return stream;
}

void crosspool_fake_destroy_stream(void* stream) { crosspool::gpu::calls().stream_destroy(stream); }

void crosspool_fake_turn(int knob) {
  crosspool::fake::turn(static_cast<crosspool::fake::Knob>(knob));
}

void crosspool_fake_fail_call(const char* name, int successes, int error) {
  crosspool::fake::fail_call(name, successes, error);
}

void crosspool_fake_fail_tail_launch(int error) { crosspool::fake::fail_tail_launch(error); }

void crosspool_fake_fail_relaunch(int error) { crosspool::fake::fail_relaunch(error); }

void crosspool_fake_fault_stage() { crosspool::fake::fault_stage(); }

const char* crosspool_fake_violation(unsigned index) {
  const auto& violations = crosspool::fake::violations();
  return index < violations.size() ? violations[index].c_str() : nullptr;
}

unsigned crosspool_fake_live() { return static_cast<unsigned>(crosspool::fake::live()); }

void crosspool_fake_reset() { crosspool::fake::reset(); }
