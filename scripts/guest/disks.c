/* Disks: DMA out of pages and into pages that no CPU has touched for a while.
 *
 *   disk:  | EXTENTS written past the page cache | EXTENTS written through it |
 *
 * An extent's words are tied to disk, extent and generation. Past the cache, two
 * rings of buffers make sure that the device, and not the CPU, is the first to
 * touch a page that is still missing: a buffer is filled SLOTS steps before it is
 * written, and read into SLOTS steps after anybody looked at it. Through the
 * cache, the kernel decides; what was written is dropped from the cache and read
 * again. Every EXTENTS steps each extent of both halves has been read and checked.
 */
#define _GNU_SOURCE
#include "devices.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "console.h"

enum {
    DISKS = 8,
    EXTENT_BYTES = 16384,
    EXTENT_WORDS = EXTENT_BYTES / 8,
    EXTENTS = 64,
    SLOTS = 32,
    CACHED_STEPS = 16,      /* what was written stays in the page cache that long */
    STEP_PAUSE_US = 2000,
};

struct slot {
    unsigned extent;
    uint32_t generation;
};

struct disk {
    struct device *device;
    uint64_t number, step, dice;
    int direct, cached;
    uint8_t *out, *in;                  /* rings of SLOTS extents */
    struct slot slots[SLOTS];           /* what each buffer of `out` holds */
    uint32_t planned[EXTENTS];          /* generation of the latest buffer */
    uint32_t written[2 * EXTENTS];      /* generation that is on the disk */
};

static const char *const names[DISKS] = {"/dev/vda", "/dev/vdb", "/dev/vdc", "/dev/vdd",
                                         "/dev/vde", "/dev/vdf", "/dev/vdg", "/dev/vdh"};

static uint64_t first_word(const struct disk *disk, unsigned extent, uint32_t generation)
{
    return words_of_place(disk->number * 2 * EXTENTS + extent, generation);
}

static void write_extent(struct disk *disk, int fd, const void *from, unsigned extent,
                         uint32_t generation)
{
    if (pwrite(fd, from, EXTENT_BYTES, (off_t)extent * EXTENT_BYTES) != EXTENT_BYTES)
        found_wrong(disk->device, "write-failed");
    disk->written[extent] = generation;
}

static void check_extent(struct disk *disk, int fd, void *into, unsigned extent)
{
    if (pread(fd, into, EXTENT_BYTES, (off_t)extent * EXTENT_BYTES) != EXTENT_BYTES)
        found_wrong(disk->device, "read-failed");
    else if (!words_are_right(into, EXTENT_WORDS,
                              first_word(disk, extent, disk->written[extent])))
        found_wrong(disk->device, fd == disk->direct ? "direct" : "cached");
    else
        disk->device->operations++;
}

static void prepare(struct disk *disk, unsigned slot, unsigned extent)
{
    uint32_t generation = ++disk->planned[extent];
    disk->slots[slot] = (struct slot){.extent = extent, .generation = generation};
    write_words((uint64_t *)(disk->out + slot * EXTENT_BYTES), EXTENT_WORDS,
                first_word(disk, extent, generation));
}

static unsigned any_extent(struct disk *disk)
{
    disk->dice = disk->dice * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(disk->dice >> 33) % EXTENTS;
}

static void step_past_cache(struct disk *disk)
{
    unsigned slot = (unsigned)(disk->step % SLOTS);
    struct slot due = disk->slots[slot];
    write_extent(disk, disk->direct, disk->out + slot * EXTENT_BYTES, due.extent, due.generation);
    check_extent(disk, disk->direct, disk->in + slot * EXTENT_BYTES,
                 (unsigned)(disk->step % EXTENTS));
    prepare(disk, slot, any_extent(disk));
}

static void step_through_cache(struct disk *disk)
{
    static _Thread_local uint64_t words[EXTENT_WORDS];
    unsigned extent = EXTENTS + any_extent(disk);
    uint32_t generation = disk->written[extent] + 1;
    write_words(words, EXTENT_WORDS, first_word(disk, extent, generation));
    write_extent(disk, disk->cached, words, extent, generation);
    if (disk->step % CACHED_STEPS == 0) {
        if (fdatasync(disk->cached))
            found_wrong(disk->device, "sync-failed");
        posix_fadvise(disk->cached, 0, 0, POSIX_FADV_DONTNEED);
    }
    check_extent(disk, disk->cached, words, EXTENTS + (unsigned)(disk->step % EXTENTS));
}

static void *take_ring(void)
{
    void *ring = mmap(NULL, SLOTS * EXTENT_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (ring == MAP_FAILED)
        die("mmap");
    return ring;
}

static struct disk *open_disk(struct device *device)
{
    struct disk *disk = calloc(1, sizeof *disk);
    if (!disk)
        die("calloc");
    disk->device = device;
    disk->number = (uint64_t)(device->name[strlen(device->name) - 1] - 'a') + 1;
    disk->direct = open(device->name, O_RDWR | O_DIRECT | O_CLOEXEC);
    disk->cached = open(device->name, O_RDWR | O_CLOEXEC);
    if (disk->direct < 0 || disk->cached < 0)
        die(device->name);
    disk->out = take_ring();
    disk->in = take_ring();
    return disk;
}

/* Generation 0 of every extent, past the cache; and the first buffers of the ring. */
static void fill_disk(struct disk *disk)
{
    for (unsigned extent = 0; extent < 2 * EXTENTS; extent++) {
        write_words((uint64_t *)disk->in, EXTENT_WORDS, first_word(disk, extent, 0));
        write_extent(disk, disk->direct, disk->in, extent, 0);
    }
    for (unsigned slot = 0; slot < SLOTS; slot++)
        prepare(disk, slot, any_extent(disk));
}

static void work_on_disk(struct device *device)
{
    struct disk *disk = open_disk(device);
    fill_disk(disk);
    for (;; disk->step++) {
        step_past_cache(disk);
        step_through_cache(disk);
        pause_us(STEP_PAUSE_US);
    }
}

void find_disks(void)
{
    for (unsigned i = 0; i < DISKS; i++)
        if (!access(names[i], F_OK))
            add_device(names[i], work_on_disk);
}
