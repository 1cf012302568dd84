/* A VGA's memory, written as a graphical guest does: frame after frame, all of it.
 *
 * It is no guest RAM and travels in QEMU's own stream. Its first part shows the
 * kernel's text, which gets a line now and then; the frame lies behind. Parts of
 * it carry words tied to part and frame, and are checked before the next frame.
 */
#define _GNU_SOURCE
#include "devices.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "console.h"

enum {
    TEXT_BYTES = 1 << 20,
    FRAME_BYTES = 8 << 20,      /* 1920 x 1080 in 32 bits */
    PART_BYTES = 32768,
    PART_WORDS = PART_BYTES / 8,
    PARTS = FRAME_BYTES / PART_BYTES,
    PART_PAUSE_US = 500,
};

/* With QEMU's -nodefaults, the first device on the bus. */
static const char MEMORY[] = "/sys/bus/pci/devices/0000:00:01.0/resource0";
static const uint64_t PLACE = 1 << 20;  /* no disk's */

static void work_on_screen(struct device *device)
{
    int fd = open(MEMORY, O_RDWR | O_CLOEXEC), text = open("/dev/tty0", O_WRONLY | O_CLOEXEC);
    uint8_t *frame = mmap(NULL, FRAME_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, TEXT_BYTES);
    if (frame == MAP_FAILED || text < 0)
        die("screen");
    for (uint64_t number = 0;; number++) {
        for (unsigned part = 0; part < PARTS; part++) {
            uint64_t *words = (uint64_t *)(frame + part * PART_BYTES);
            if (number && !words_are_right(words, PART_WORDS,
                                           words_of_place(PLACE + part, number - 1)))
                found_wrong(device, "frame");
            write_words(words, PART_WORDS, words_of_place(PLACE + part, number));
            device->operations++;
            pause_us(PART_PAUSE_US);
        }
        dprintf(text, "frame %llu\n", (unsigned long long)number);
    }
}

void find_screen(void)
{
    mkdir("/sys", 0755);
    if (mount("sysfs", "/sys", "sysfs", 0, NULL))
        die("/sys");
    if (!access(MEMORY, F_OK))
        add_device("screen", work_on_screen);
}
