/* The guest's serial port and clock: how the workload speaks to the host. */
#ifndef CONSOLE_H
#define CONSOLE_H

#include <stdint.h>

/* Our serial port, raw and non-blocking; ends the guest if there is none. */
int open_serial(void);

/* Writes one line whole, waiting for room; longer than 127 characters is cut. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Says why, and powers the guest off. */
void die(const char *what) __attribute__((noreturn));

/* CLOCK_MONOTONIC: stands while the VM is stopped, runs while it waits for pages. */
uint64_t now_us(void);

#endif
