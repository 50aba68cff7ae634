// The plain loops on bf16, for kernels that hand over the rare call they can't do exactly: AVX-512's, which whatever
// has AVX512-BF16 runs, too.
#pragma once
#include "../../common/kernel_table.h"

namespace cnnfast::avx512 {

const char* direct_fprop_bf16(const void* params, const Launch& launch);
const char* direct_dgrad_bf16(const void* params, const Launch& launch);

}  // namespace cnnfast::avx512
