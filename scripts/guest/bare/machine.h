/* What the bare guest uses of QEMU's q35: serial port, clock, power button.
 *
 * No interrupts and no calibration: the port is polled, the clock is the HPET,
 * whose frequency is fixed and whose counter QEMU moves with the guest. It
 * stands while the VM is stopped and runs while the guest waits for pages.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include <stdint.h>

/* Starts the clock; ends the guest if it is not what we know. */
void start_clock(void);

/* Since `start_clock`. */
uint64_t now_us(void);

/* Writes a line: the word, the numbers in decimal, the tail if there is one. */
void say_line(const char *word, const uint64_t *numbers, unsigned count, const char *tail);

#define SAY(word, ...)                                                                             \
    say_line(word, (const uint64_t[]){__VA_ARGS__},                                                \
             sizeof(const uint64_t[]){__VA_ARGS__} / sizeof(uint64_t), 0)

/* One byte that the host sent, or -1. */
int hear(void);

void power_off(void) __attribute__((noreturn));

/* Divides in place; returns the remainder. (64-bit division is libgcc's, which we have not.) */
uint32_t divide(uint64_t *value, uint32_t by);

#endif
