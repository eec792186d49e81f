// The AMX kernels on emulated tile registers (amx_emulated.cpp).
#pragma once

#include "kron/problem.h"

void amx_emulated_forward(const kron::ForwardArgs& args, const kron::Executor& executor);
void amx_emulated_ffn(const kron::FfnArgs& args, const kron::Executor& executor);
