#!/usr/bin/env python3
"""The bf16 matrix product rate of this machine's cuBLASLt, as one line of JSON: a ceiling for scripts/gpu_check.sh.

    scripts/matmul_ceiling.py [--size 8192] [--library libcublasLt.so.13]

Calls the library through ctypes, so that nothing has to be built or linked: C = A B^T in bf16 with binary32 sums, random operands
(zeros run faster), one cached algorithm, median of the timed calls. Exits with 3 and says why where there is no library or GPU.
"""
import argparse
import ctypes
import glob
import json
import random
import statistics
import sys

CUDA_R_32F, CUDA_R_16BF, COMPUTE_32F = 0, 14, 68
DESC_TRANSA, PREFERENCE_WORKSPACE, OP_T = 3, 1, 1
WORKSPACE = 64 << 20


def load(names, what):
    for name in names:
        try:
            return ctypes.CDLL(name), name
        except OSError:
            continue
    sys.stderr.write(f"{what} not found (tried {', '.join(names)})\n")
    sys.exit(3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--library", help="path of libcublasLt")
    parser.add_argument("--repeat", type=int, default=15)
    arguments = parser.parse_args()
    found = sorted(glob.glob("/usr/local/cuda*/lib64/libcublasLt.so.1?") + glob.glob("/usr/local/cuda*/targets/x86_64-linux/lib/libcublasLt.so.1?"))
    cublas, library = load([arguments.library] if arguments.library else ["libcublasLt.so.13", *found], "libcublasLt")
    runtime = sorted(glob.glob("/usr/local/cuda*/lib64/libcudart.so.1?") + glob.glob("/usr/local/cuda*/targets/x86_64-linux/lib/libcudart.so.1?"))
    cuda, _ = load(["libcudart.so.13", *runtime], "libcudart")

    def check(call, code):
        if code != 0:
            sys.stderr.write(f"{call} failed with {code}\n")
            sys.exit(3)

    n, pointer = arguments.size, ctypes.c_void_p
    buffers = []
    for bytes_ in (2 * n * n, 2 * n * n, 2 * n * n, WORKSPACE):
        buffers.append(pointer())
        check("cudaMalloc", cuda.cudaMalloc(ctypes.byref(buffers[-1]), ctypes.c_size_t(bytes_)))
    generator = random.Random(1)
    # Magnitudes 1/8 .. 2, both signs, all mantissas: bytes 0x3e, 0x3f, 0xbe, 0xbf in front of random ones.
    row = bytes(b for _ in range(1 << 20) for b in (generator.getrandbits(8), generator.choice((0x3E, 0x3F, 0xBE, 0xBF))))
    for target in buffers[:2]:
        for start in range(0, 2 * n * n, len(row)):
            size = min(len(row), 2 * n * n - start)
            check("cudaMemcpy", cuda.cudaMemcpy(pointer(target.value + start), row, ctypes.c_size_t(size), 1))

    handle, desc, layout, preference = pointer(), pointer(), pointer(), pointer()
    check("cublasLtCreate", cublas.cublasLtCreate(ctypes.byref(handle)))
    check("cublasLtMatmulDescCreate", cublas.cublasLtMatmulDescCreate(ctypes.byref(desc), COMPUTE_32F, CUDA_R_32F))
    transpose = ctypes.c_int32(OP_T)
    check("cublasLtMatmulDescSetAttribute", cublas.cublasLtMatmulDescSetAttribute(desc, DESC_TRANSA, ctypes.byref(transpose), ctypes.c_size_t(4)))
    size, leading = ctypes.c_uint64(n), ctypes.c_int64(n)
    check("cublasLtMatrixLayoutCreate", cublas.cublasLtMatrixLayoutCreate(ctypes.byref(layout), CUDA_R_16BF, size, size, leading))
    check("cublasLtMatmulPreferenceCreate", cublas.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
    workspace = ctypes.c_size_t(WORKSPACE)
    check("cublasLtMatmulPreferenceSetAttribute",
          cublas.cublasLtMatmulPreferenceSetAttribute(preference, PREFERENCE_WORKSPACE, ctypes.byref(workspace), ctypes.c_size_t(8)))
    heuristic, count = ctypes.create_string_buffer(96), ctypes.c_int()  # cublasLtMatmulHeuristicResult_t starts with the algorithm
    check("cublasLtMatmulAlgoGetHeuristic",
          cublas.cublasLtMatmulAlgoGetHeuristic(handle, desc, layout, layout, layout, layout, preference, 1, heuristic, ctypes.byref(count)))
    if count.value == 0:
        sys.stderr.write("cuBLASLt has no algorithm for this product\n")
        sys.exit(3)
    one, zero, stream = ctypes.c_float(1), ctypes.c_float(0), pointer()
    start, stop = pointer(), pointer()
    for event in (start, stop):
        check("cudaEventCreate", cuda.cudaEventCreate(ctypes.byref(event)))
    rates = []
    for i in range(arguments.repeat + 3):
        cuda.cudaEventRecord(start, stream)
        check("cublasLtMatmul", cublas.cublasLtMatmul(handle, desc, ctypes.byref(one), buffers[0], layout, buffers[1], layout, ctypes.byref(zero), buffers[2], layout,
                                                      buffers[2], layout, heuristic, buffers[3], workspace, stream))
        cuda.cudaEventRecord(stop, stream)
        check("cudaEventSynchronize", cuda.cudaEventSynchronize(stop))
        milliseconds = ctypes.c_float()
        check("cudaEventElapsedTime", cuda.cudaEventElapsedTime(ctypes.byref(milliseconds), start, stop))
        if i >= 3:
            rates.append(2 * n**3 / milliseconds.value * 1e-9)
    print(json.dumps({"bf16_matmul_tflop_per_s": round(statistics.median(rates), 1), "size": n, "library": library}))


if __name__ == "__main__":
    main()
