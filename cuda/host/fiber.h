/* Threads of execution that hand over to each other by name: a stack and where it stopped.
 *
 * On x86-64 a switch is a few instructions; elsewhere ucontext does it. AddressSanitizer is
 * told of every switch. */
#ifndef ACRE_HOST_FIBER_H
#define ACRE_HOST_FIBER_H

#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ACRE_FIBER_ASAN 1
#else
#define ACRE_FIBER_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

enum { ACRE_FIBER_STACK = 1 << 17 };

struct acre_fiber {
  char *stack; /* NULL: the stack of the thread itself */
#if defined(__x86_64__)
  void *stopped;
#else
  ucontext_t stopped;
#endif
  void *fake; /* AddressSanitizer's */
  const void *bottom;
  size_t size;
};

#if defined(__x86_64__)
extern "C" void acre_fiber_jump(void **from, void *to);
__asm__(
    ".text\n"
    ".type acre_fiber_jump,@function\n"
    "acre_fiber_jump:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size acre_fiber_jump,.-acre_fiber_jump\n");
#endif

static thread_local acre_fiber *acre_fiber_left; /* who handed over last */
static thread_local void (*acre_fiber_run)(void);

/* On the new stack: tells where the old one lies. */
static inline void acre_fiber_arrived(acre_fiber *self) {
#if ACRE_FIBER_ASAN
  const void *bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self ? self->fake : NULL, &bottom, &size);
  if (!acre_fiber_left->stack)
    acre_fiber_left->bottom = bottom, acre_fiber_left->size = size;
#else
  (void)self;
#endif
}

__attribute__((no_sanitize("address"))) static void acre_fiber_main(void) {
  acre_fiber_arrived(NULL);
  acre_fiber_run(); /* never returns */
}

/* From `from`, which is running, to `to`; `for_good` where nobody will come back. */
static inline void acre_fiber_switch(acre_fiber *from, acre_fiber *to, bool for_good) {
  acre_fiber_left = from;
#if ACRE_FIBER_ASAN
  __sanitizer_start_switch_fiber(for_good ? NULL : &from->fake, to->bottom, to->size);
#else
  (void)for_good;
#endif
#if defined(__x86_64__)
  acre_fiber_jump(&from->stopped, to->stopped);
#else
  swapcontext(&from->stopped, &to->stopped);
#endif
  acre_fiber_arrived(from);
}

/* Its functions never returned: what they marked of the stack is forgotten. */
static inline void acre_fiber_abandon(acre_fiber *fiber) {
#if ACRE_FIBER_ASAN
  __asan_unpoison_memory_region(fiber->stack, ACRE_FIBER_STACK);
#else
  (void)fiber;
#endif
}

/* `run` starts at the next switch to it, on a stack with a page nobody may touch below. */
static inline void acre_fiber_begin(acre_fiber *fiber, void (*run)(void)) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  if (!fiber->stack) {
    void *map = mmap(NULL, page + ACRE_FIBER_STACK, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(map, page, PROT_NONE) != 0) __builtin_trap();
    fiber->stack = (char *)map + page;
    fiber->bottom = fiber->stack, fiber->size = ACRE_FIBER_STACK;
  }
  acre_fiber_run = run;
#if defined(__x86_64__)
  void **top = (void **)(void *)(fiber->stack + ACRE_FIBER_STACK) - 2;
  *top = (void *)acre_fiber_main; /* returned to with the stack as after a call */
  fiber->stopped = top - 6;
#else
  getcontext(&fiber->stopped);
  fiber->stopped.uc_stack = {fiber->stack, 0, ACRE_FIBER_STACK};
  makecontext(&fiber->stopped, acre_fiber_main, 0);
#endif
}

#endif
