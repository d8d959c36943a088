#include "tree/output.h"

#include <stdlib.h>

#include "util/cleanup.h"
#include "util/errors.h"

#define OUTPUT_READ_MAX (1024 * 1024)

/* What stands where the output should end. */
static int output_error(const struct command *command) {
    return command->end == COMMAND_LOST      ? -ERR_COMMAND_LOST
           : command->end == COMMAND_REFUSED ? command->error
                                             : 0;
}

off_t output_size(const struct command *command, const struct spool *spool) {
    if (!command)
        return 1;
    if (spool->cut || output_error(command) < 0)
        return (off_t)spool->end + 1;
    return spool->end == 0 && command->end == COMMAND_RUNNING ? 1 : (off_t)spool->end;
}

bool output_answer_read(struct command *command, struct spool *spool, uint64_t *position,
                        size_t length, struct request *rq) {
    if (*position >= spool->end && !spool->cut) {
        if (command->end == COMMAND_RUNNING)
            return false;
        if (output_error(command) < 0)
            request_answer(rq, output_error(command));
        else
            request_answer_data(rq, "", 0);
        return true;
    }
    if (length > OUTPUT_READ_MAX)
        length = OUTPUT_READ_MAX;
    if (*position < spool->end && length > spool->end - *position)
        length = (size_t)(spool->end - *position);
    cleanup_free char *data = malloc(length);
    ssize_t n = data ? spool_read(spool, *position, data, length) : -ERR_NO_MEMORY;
    if (n < 0) {
        request_answer(rq, n == -EOVERFLOW ? -ERR_CUT : (int)n);
        return true;
    }
    *position += (uint64_t)n;
    command_has_read(command, spool, *position);
    request_answer_data(rq, data, (size_t)n);
    return true;
}
