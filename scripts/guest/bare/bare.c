/* A guest without an operating system, for KVM on machines that virtualise no more than that.
 *
 * KVM reaches guest memory from kernel mode, and on a machine that is itself a
 * guest it may have to emulate each instruction: this guest is what such a KVM
 * can run (32-bit protected mode, no paging, no interrupts), and small enough
 * to be at work within seconds. To the host it is the guest of ../workload.c:
 * the same lines on the serial port, with the workload `bare`, which touches
 * pages at random (pages.h) and writes half of the data pages it touches. Its
 * rate at the start is one that every KVM holds.
 */
#include "machine.h"
#include "pages.h"

enum {
    PAGES_PER_REQUEST = 16,
    RATE = 100, /* requests a second */
    REPORT_US = 20000,
    LATE_US = 10000, /* a request answered later than this is late */
};

/* The head of the multiboot information. */
struct multiboot {
    uint32_t flags, lower_kib, upper_kib; /* upper: from 1 MiB to the first hole */
};

static struct {
    uint64_t operations, late_us;
    uint64_t clock_us;      /* request n since then falls due n / rate seconds later */
    uint64_t served;        /* requests since then */
    uint64_t late_until_us; /* lateness is counted up to here */
    uint64_t next_report_us;
    uint32_t sequence, rate;
} progress = {.rate = RATE};

static void serve_request(void)
{
    for (unsigned i = 0; i < PAGES_PER_REQUEST; i++)
        touch_any();
    progress.operations++;
}

/* --- reports and commands ---------------------------------------------------------------- */

static void report_if_due(void)
{
    uint64_t now = now_us();
    if (now < progress.next_report_us)
        return;
    SAY("@r", ++progress.sequence, now, progress.operations, progress.late_us, memory.corrupt);
    progress.next_report_us = now + REPORT_US;
}

static void restart_clock(void)
{
    progress.clock_us = progress.late_until_us = now_us();
    progress.served = 0;
}

static uint32_t number_in(const char *text)
{
    uint32_t value = 0;
    for (; *text == ' ' || (*text >= '0' && *text <= '9'); text++)
        value = *text == ' ' ? value : value * 10 + (uint32_t)(*text - '0');
    return value;
}

static void obey(const char *command)
{
    if (command[0] == 'v') {
        check_all_pages(report_if_due);
        SAY("@v", memory.data_pages + memory.zero_pages, memory.corrupt);
        restart_clock(); /* the host asked for this pause: nobody was late */
    } else if (command[0] == 'r') {
        progress.rate = number_in(command + 1);
        restart_clock();
        SAY("@rate", progress.rate);
    } else if (command[0] == 'q') {
        power_off();
    }
}

static void read_commands(void)
{
    static char line[32];
    static unsigned length;
    for (int byte; (byte = hear()) >= 0;) {
        if (byte == '\n') {
            line[length] = 0;
            length = 0;
            obey(line);
        } else if (length < sizeof line - 1) {
            line[length++] = (char)byte;
        }
    }
}

/* --- the loop ---------------------------------------------------------------------------- */

static uint64_t next_due_us(void)
{
    uint64_t after_us = progress.served * 1000000;
    divide(&after_us, progress.rate);
    return progress.clock_us + after_us;
}

/* Adds the time during which at least one request was overdue by LATE_US. */
static void count_lateness(uint64_t due, uint64_t now)
{
    uint64_t from = due + LATE_US;
    if (from < progress.late_until_us)
        from = progress.late_until_us;
    if (now > from) {
        progress.late_us += now - from;
        progress.late_until_us = now;
    }
}

static void serve_if_due(void)
{
    uint64_t due = next_due_us();
    if (due > now_us())
        return;
    serve_request();
    progress.served++;
    count_lateness(due, now_us());
}

void bare_main(const struct multiboot *info) __attribute__((noreturn));

void bare_main(const struct multiboot *info)
{
    start_clock();
    fill_memory((1024 + info->upper_kib) * 1024);
    SAY("@ready bare", progress.rate, memory.data_pages, memory.zero_pages, memory.total_pages);
    restart_clock();
    for (;;) {
        if (progress.rate)
            serve_if_due();
        else
            serve_request();
        report_if_due();
        read_commands();
    }
}
