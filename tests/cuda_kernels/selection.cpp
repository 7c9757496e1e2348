// Calls the C API once for each way through the kernels, on small shapes of plain memory: for sanitizers that do not
// go with Python. Prints what was launched; results are not judged here. Arguments: the names of some of the calls.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "../../csrc/include/xformer_kernels.h"

namespace {

int failures = 0, argument_count;
char** arguments;

// All are wanted, or those that the command line names.
bool wanted(const char* what) {
  bool found = argument_count < 2;
  for (int i = 1; i < argument_count; ++i) found |= !strcmp(arguments[i], what);
  return found;
}

void report(const char* what, int status) {
  printf("%s: %s\n", what, status == XK_OK ? xk_cuda_launched() : xk_cuda_error());
  failures += status != XK_OK;
}

std::vector<float> numbers(int64_t count) {
  std::vector<float> x((size_t)count);
  for (size_t i = 0; i < x.size(); ++i) x[i] = (float)((int)(i * 7919 % 1009) - 504) / 300;
  return x;
}

struct Shape {
  int64_t batch, heads, tokens, dim;
  int64_t size(int64_t features) const { return batch * heads * tokens * features; }
};

// Tokens in the order (batch, tokens, heads, features).
struct Tokens {
  std::vector<float> data;
  xk_tensor t;
  Tokens(const Shape& s, int64_t features) : data(numbers(s.size(features))) {
    t = {data.data(), s.tokens * s.heads * features, features, s.heads * features, 1, XK_F32};
  }
};

struct Workspace {
  void* data;
  explicit Workspace(int64_t bytes) : data(aligned_alloc(256, (size_t)((bytes + 511) / 256 * 256))) {}
  ~Workspace() { free(data); }
};

struct Options {
  int map = XK_QUERY_KEY, norm = XK_TOKEN_NORM, activation = XK_SOFTMAX;
  bool masked = false;
  int path = XK_ANY_PATH;
};

void xfa(const char* what, Shape s, Options o) {
  if (!wanted(what)) return;
  Tokens q(s, s.dim), k(s, s.dim), v(s, s.dim), out(s, s.dim), dout(s, s.dim), dq(s, s.dim), dk(s, s.dim), dv(s, s.dim);
  std::vector<float> temperature = numbers(s.heads), dtemperature(temperature);
  std::vector<float> stats((size_t)(s.batch * s.heads * (s.dim * s.dim + 2 * s.dim)));
  std::vector<uint8_t> mask((size_t)(s.batch * s.tokens));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 != 1;
  xk_xfa_args a = {};
  a.batch = s.batch, a.heads = s.heads, a.tokens = s.tokens, a.dim = s.dim;
  a.map = o.map, a.norm = o.norm, a.activation = o.activation, a.eps = 1e-12;
  a.q = q.t, a.k = k.t, a.v = v.t, a.out = out.t, a.dout = dout.t, a.dq = dq.t, a.dk = dk.t, a.dv = dv.t;
  a.temperature = {temperature.data(), 1, XK_F32};
  a.dtemperature = {dtemperature.data(), 1, XK_F32};
  if (o.masked) a.mask = {mask.data(), s.tokens, 1};
  a.stats = stats.data();
  xk_cuda_launch l = {};
  l.path = o.path;
  {
    Workspace workspace(xk_cuda_xfa_forward_workspace(&a, &l));
    l.workspace = workspace.data;
    report((std::string(what) + " forward").c_str(), xk_cuda_xfa_forward(&a, &l));
  }
  Workspace workspace(xk_cuda_xfa_backward_workspace(&a, &l));
  l.workspace = workspace.data;
  report((std::string(what) + " backward").c_str(), xk_cuda_xfa_backward(&a, &l));
}

}  // namespace

int main(int argc, char** argv) {
  argument_count = argc;
  arguments = argv;
  const Options two_passes = {.path = XK_TWO_PASSES};
  xfa("one block", {2, 2, 21, 8}, {});
  xfa("one block, key_value", {1, 4, 21, 7}, {.map = XK_KEY_VALUE, .masked = true});
  xfa("cluster", {1, 1, 130, 33}, {.masked = true});
  xfa("cluster, key_value", {1, 1, 130, 8}, {.map = XK_KEY_VALUE});
  xfa("cluster, identity", {1, 1, 130, 5}, {.activation = XK_IDENTITY});
  xfa("two passes", {2, 1, 300, 36}, two_passes);
  xfa("two passes of 64 features", {1, 2, 70, 64}, two_passes);
  xfa("two passes, key_value", {1, 2, 70, 32}, {.map = XK_KEY_VALUE, .masked = true, .path = XK_TWO_PASSES});
  return failures != 0;
}
