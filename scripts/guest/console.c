#define _GNU_SOURCE
#include "console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int serial = -1;

int open_serial(void)
{
    struct termios raw;
    serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (serial < 0 || tcgetattr(serial, &raw))
        _exit(1);
    cfmakeraw(&raw);
    raw.c_cflag |= CLOCAL;
    tcsetattr(serial, TCSANOW, &raw);
    return serial;
}

void say(const char *format, ...)
{
    char line[128];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 1)
        length = (int)sizeof line - 1;
    for (const char *at = line; length > 0;) {
        ssize_t written = write(serial, at, (size_t)length);
        struct pollfd room = {.fd = serial, .events = POLLOUT};
        if (written < 0) {
            poll(&room, 1, -1);
        } else {
            at += written;
            length -= (int)written;
        }
    }
}

void die(const char *what)
{
    say("@dead %s: %s\n", what, strerror(errno));
    tcdrain(serial);
    reboot(RB_POWER_OFF);
    _exit(1);
}

uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}
