// For test_shim.py: runs the cases it is given the names of, and prints the results of each, or the report.
#include "shim_right.h"
#include "shim_wrong.h"

namespace {

// Floats on stdin; each rounded to __half, to __nv_bfloat16 and to tf32 on stdout.
int convert() {
  for (float x; fread(&x, 4, 1, stdin);) {
    const float rounded[3] = {__half2float(__float2half_rn(x)), __bfloat162float(__float2bfloat16_rn(x)),
                              wmma::__float_to_tf32(x)};
    fwrite(rounded, 4, 3, stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !strcmp(argv[1], "convert")) return convert();
  for (int i = 1; i < argc; ++i) {
    Case run;
    for (const auto* cases : {&right, &barriers, &addresses, &operands, &launches, &races, &poisoned})
      if (const auto found = cases->find(argv[i]); found != cases->end()) run = found->second;
    const cudaError_t error = run();
    if (error != cudaSuccess) printf("%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
    printf("\n--\n");
    fflush(stdout);
  }
}
