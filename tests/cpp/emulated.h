// The AMX kernels on emulated tile registers (amx_emulated.cpp).
#pragma once

#include "kron/problem.h"

void amx_emulated_forward(const kron::ForwardArgs& args, const kron::Executor& executor);
int64_t amx_emulated_packed_bytes(const kron::Shape& shape);
void amx_emulated_pack(const kron::Shape& shape, const kron::Factor& a, const kron::Factor& b, void* out,
                       const kron::Executor& executor);
bool amx_emulated_ffn_is_fused(const kron::Shape& first, const kron::Shape& second, bool packed);
void amx_emulated_ffn(const kron::FfnArgs& args, const kron::Executor& executor);
