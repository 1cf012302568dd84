#include "error.h"

#include <stdio.h>

int qpc_fail(struct qpc_error *error, int code, int error_number, const char *operation,
             uint64_t address, uint64_t length)
{
    error->code = code;
    error->error_number = error_number;
    snprintf(error->operation, sizeof error->operation, "%s", operation);
    error->address = address;
    error->length = length;
    return code;
}
