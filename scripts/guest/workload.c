/* The guest of the demo, the tests and the benchmark: /init of a bare initramfs.
 *
 * It fills the memory it finds (pages.h), works on it at a given rate or as fast
 * as it can, and reports how far it is and how late.
 *
 * Workloads (how pages are drawn: picks.h; 20 pages a request, half of them written):
 *   service  requests at a fixed rate, nearly all to hot pages
 *   kv       pages by Zipf's law, as fast as it can
 *   scan     all pages in address order, round and round, as fast as it can
 *   churn    writes only, uniformly at random, as fast as it can
 *   idle     a heartbeat: a request touches nothing
 *
 * Serial protocol, one line each, decimal. Guest to host:
 *   @ready WORKLOAD RATE DATA_PAGES ZERO_PAGES TOTAL_PAGES
 *   @r SEQ GUEST_US OPS LATE_US CORRUPT      every 20 ms
 *   @c PAGE WHY                              a corrupt page (the first 16)
 *   @v PAGES CORRUPT                         verify is done
 *   @rate RATE                               the rate is now this
 * Host to guest: "v" verify everything, "r RATE" set the rate, "q" power off.
 *
 * Kernel command line (the kernel hands words that are not its own to init's
 * environment): workload=NAME, rate=REQUESTS_PER_SECOND (0: as fast as
 * it can; absent: the workload's own, lowered to what this guest can hold with
 * half a core to spare), drivers=on (load those of virtio devices first),
 * spare=MIB (memory that had content and is free, see spare.h), freeing=MIB (of that,
 * used and freed again and again),
 * devices=on (then work on those devices too, devices.h), fill=MIB (work as if
 * there were no more memory than that).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "console.h"
#include "devices.h"
#include "drivers.h"
#include "pages.h"
#include "picks.h"
#include "spare.h"

enum {
    TICK_US = 2000,          /* requests that fall due within a tick are served together */
    REPORT_US = 20000,
    DEVICES_EVERY = 5,       /* reports */
    LATE_US = 10000,         /* a request answered later than this is late */
    CALIBRATE_US = 300000,
};

struct workload {
    const char *name;
    unsigned rate;              /* requests a second; 0: as fast as it can */
    unsigned pages_per_request;
    unsigned written_of_16;     /* how many of 16 touches write */
    void (*prepare)(void);      /* once memory is filled */
    uint64_t (*pick)(void);     /* rank of the page to touch */
};

struct progress {
    uint64_t sequence, operations, late_us;
    uint64_t clock_us;          /* request n since then falls due n / rate seconds later */
    uint64_t served;            /* requests since then */
    uint64_t late_until_us;     /* lateness is counted up to here */
    uint64_t next_report_us;
    unsigned rate;
};

static struct progress progress;
static const struct workload *workload;
static int serial = -1;

/* --- workloads --------------------------------------------------------------------------- */

static const struct workload workloads[] = {
    {.name = "service", .rate = 2000, .pages_per_request = 20, .written_of_16 = 8,
     .pick = pick_hot},
    {.name = "kv", .pages_per_request = 20, .written_of_16 = 8, .prepare = prepare_zipf,
     .pick = pick_zipf},
    {.name = "scan", .pages_per_request = 20, .written_of_16 = 8, .prepare = prepare_sweep,
     .pick = pick_next},
    {.name = "churn", .pages_per_request = 20, .written_of_16 = 16, .pick = pick_data},
    {.name = "idle", .rate = 100},
};

static void serve_request(void)
{
    for (unsigned i = 0; i < workload->pages_per_request; i++) {
        uint64_t rank = workload->pick();
        touch(rank, (next_random() & 15) < workload->written_of_16);
    }
    progress.operations++;
}

/* Requests of this workload that a second of full speed holds. */
static uint64_t calibrate(void)
{
    uint64_t start = now_us(), requests = 0, spent;
    do {
        for (int i = 0; i < 32; i++, requests++)
            serve_request();
        spent = now_us() - start;
    } while (spent < CALIBRATE_US);
    progress.operations = 0;
    return requests * 1000000 / spent;
}

/* --- reports and commands ---------------------------------------------------------------- */

static void report(uint64_t now)
{
    say("@r %llu %llu %llu %llu %llu\n", (unsigned long long)++progress.sequence,
        (unsigned long long)now, (unsigned long long)progress.operations,
        (unsigned long long)progress.late_us, (unsigned long long)memory.corrupt);
    progress.next_report_us = now + REPORT_US;
    if (progress.sequence % DEVICES_EVERY == 0)
        report_devices();
}

static void restart_clock(void)
{
    progress.clock_us = progress.late_until_us = now_us();
    progress.served = 0;
}

static void report_if_due(void)
{
    uint64_t now = now_us();
    if (now >= progress.next_report_us)
        report(now);
}

static void verify(void)
{
    check_all_pages(report_if_due);
    say("@v %llu %llu\n", (unsigned long long)memory.touched_pages,
        (unsigned long long)memory.corrupt);
    restart_clock(); /* the host asked for this pause: nobody was late */
}

static void obey(const char *command)
{
    if (command[0] == 'v') {
        verify();
    } else if (command[0] == 'r') {
        progress.rate = (unsigned)strtoul(command + 1, NULL, 10);
        restart_clock();
        say("@rate %u\n", progress.rate);
    } else if (command[0] == 'q') {
        tcdrain(serial);
        reboot(RB_POWER_OFF);
    }
}

static void read_commands(void)
{
    static char line[64];
    static size_t length;
    char byte;
    while (read(serial, &byte, 1) == 1) {
        if (byte == '\n') {
            line[length] = 0;
            length = 0;
            obey(line);
        } else if (length < sizeof line - 1) {
            line[length++] = byte;
        }
    }
}

static void wait_for_command(uint64_t until_us)
{
    uint64_t now = now_us(), wait_us = until_us > now ? until_us - now : 0;
    struct timespec timeout = {.tv_sec = (time_t)(wait_us / 1000000),
                               .tv_nsec = (long)(wait_us % 1000000) * 1000};
    struct pollfd waiting = {.fd = serial, .events = POLLIN};
    if (ppoll(&waiting, 1, &timeout, NULL) == 1)
        read_commands();
}

/* --- the loop ---------------------------------------------------------------------------- */

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

static uint64_t next_due_us(void)
{
    return progress.clock_us + progress.served * 1000000 / progress.rate;
}

/* Serves what is due, in order; looks at the clock after each, so that lateness is exact. */
static void serve_due(uint64_t *now)
{
    for (uint64_t due; (due = next_due_us()) <= *now && *now < progress.next_report_us;) {
        serve_request();
        progress.served++;
        *now = now_us();
        count_lateness(due, *now);
    }
}

static void run(void)
{
    uint64_t now = now_us();
    progress.next_report_us = now;
    restart_clock();
    for (;;) {
        if (progress.rate)
            serve_due(&now);
        else
            for (; now < progress.next_report_us; now = now_us())
                serve_request();
        if (now >= progress.next_report_us) {
            report(now);
            wait_for_command(0);
        } else {
            wait_for_command(now + TICK_US);
        }
        now = now_us();
    }
}

/* --- start ------------------------------------------------------------------------------- */

static void choose_workload(void)
{
    const char *name = getenv("workload");
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++)
        if (!name || !strcmp(workloads[i].name, name)) {
            workload = &workloads[i];
            return;
        }
    errno = EINVAL;
    die("unknown workload");
}

static void choose_rate(void)
{
    const char *given = getenv("rate");
    progress.rate = given ? (unsigned)strtoul(given, NULL, 10) : workload->rate;
    if (given || !workload->rate || !workload->pages_per_request)
        return;
    uint64_t half = calibrate() / 2;
    if (half < progress.rate)
        progress.rate = half ? (unsigned)half : 1;
}

/* A word of the kernel's command line; 0: not there. */
static uint64_t mebibytes_of(const char *name)
{
    const char *given = getenv(name);
    return given ? strtoull(given, NULL, 10) << 20 : 0;
}

int main(void)
{
    mkdir("/proc", 0755);
    mkdir("/dev", 0755);
    if (mount("proc", "/proc", "proc", 0, NULL) || mount("dev", "/dev", "devtmpfs", 0, NULL))
        _exit(1);
    serial = open_serial();
    if (getenv("drivers"))
        load_drivers();
    choose_workload();
    uint64_t spare_bytes = mebibytes_of("spare");
    if (spare_bytes)
        hold_spare(spare_bytes, mebibytes_of("freeing"));
    fill_memory();
    if (workload->prepare)
        workload->prepare();
    if (spare_bytes)
        free_spare();
    choose_rate();
    start_devices();
    say("@ready %s %u %llu %llu %llu\n", workload->name, progress.rate,
        (unsigned long long)memory.data_pages,
        (unsigned long long)(memory.touched_pages - memory.data_pages),
        (unsigned long long)memory.total_pages);
    run();
}
