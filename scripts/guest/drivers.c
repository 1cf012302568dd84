#define _GNU_SOURCE
#include "drivers.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "console.h"

static const char DIRECTORY[] = "/drivers";

static int is_module(const struct dirent *entry)
{
    return strstr(entry->d_name, ".ko") != NULL;
}

static void load(int directory, const char *name)
{
    int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
        die(name);
    close(fd);
}

void load_drivers(void)
{
    struct dirent **found;
    int directory = open(DIRECTORY, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int count = scandir(DIRECTORY, &found, is_module, alphasort);
    if (directory < 0 || count < 0)
        die(DIRECTORY);
    for (int i = 0; i < count; i++) {
        load(directory, found[i]->d_name);
        free(found[i]);
    }
    free(found);
    close(directory);
}
