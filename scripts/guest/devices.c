#define _GNU_SOURCE
#include "devices.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "console.h"
#include "pages.h"

enum { DEVICES = 16, WRONG_LINES = 16 };

static const uint64_t WORD_STEP = 0x9E3779B97F4A7C15u;

static struct device devices[DEVICES];
static unsigned device_count, wrong_lines;

/* --- content ----------------------------------------------------------------------------- */

/* The first word of what lies at a place; splitmix64's finalizer. The host computes it too. */
uint64_t words_of_place(uint64_t place, uint64_t generation)
{
    uint64_t value = (place << 32) + generation + 1;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

void write_words(uint64_t *words, unsigned count, uint64_t first)
{
    for (unsigned i = 0; i < count; i++, first += WORD_STEP)
        words[i] = first;
}

int words_are_right(const uint64_t *words, unsigned count, uint64_t first)
{
    uint64_t differs = 0;
    for (unsigned i = 0; i < count; i++, first += WORD_STEP)
        differs |= words[i] ^ first;
    return !differs;
}

/* --- threads ----------------------------------------------------------------------------- */

void found_wrong(struct device *device, const char *why)
{
    device->why = why;
    device->wrong++;
}

void pause_us(unsigned us)
{
    usleep(us);
}

static void *work(void *device)
{
    ((struct device *)device)->work(device);
    return NULL;
}

void add_device(const char *name, void (*run)(struct device *device))
{
    pthread_t thread;
    if (device_count == DEVICES) {
        errno = ENOSPC;
        die("devices");
    }
    struct device *device = &devices[device_count++];
    device->name = name;
    device->work = run;
    if ((errno = pthread_create(&thread, NULL, work, device)))
        die(name);
}

void start_devices(void)
{
    if (!getenv("devices"))
        return;
    find_disks();
    find_echoes();
    find_screen();
}

void report_devices(void)
{
    for (struct device *device = devices; device < devices + device_count; device++) {
        uint64_t wrong = device->wrong;
        if (wrong != device->wrong_said && wrong_lines++ < WRONG_LINES)
            say("@c %s %s\n", device->name, device->why);
        memory.corrupt += wrong - device->wrong_said;
        device->wrong_said = wrong;
        say("@d %s %llu %llu\n", device->name, (unsigned long long)device->operations,
            (unsigned long long)device->lost);
    }
}
