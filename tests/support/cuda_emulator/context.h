// Saved contexts of fibers, and switching between them. Used only by launch.cpp.
#pragma once

#include <cstddef>

namespace emulator {

#if defined(__x86_64__)

struct Context {
    void* stack_pointer;
};

// Save the callee-saved registers and the stack pointer, and restore those of `to`.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

inline void begin_context(Context& context, unsigned char* bottom, unsigned char* top, void (*run)()) {
    (void)bottom;
    auto slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // align the stack for `run` as after a call
    *--slot = reinterpret_cast<void*>(run);
    for (int i = 0; i < 6; i++) *--slot = nullptr;
    context.stack_pointer = slot;
}

inline void switch_context(Context& from, Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }

#else  // other processors use the C library, which is about ten times slower

}  // namespace emulator
#include <ucontext.h>
namespace emulator {

struct Context {
    ucontext_t saved;
};

inline void begin_context(Context& context, unsigned char* bottom, unsigned char* top, void (*run)()) {
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = bottom;
    context.saved.uc_stack.ss_size = static_cast<size_t>(top - bottom);
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, run, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#endif

}  // namespace emulator
