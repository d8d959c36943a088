#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "tree/request.h"
#include "vm/command.h"

/* Reading the output of a command that may still run: what `exec` and the streams of jobs/ share.
 */

/* The size to be shown: what there is, which is what tail(1) looks at the end of. Where the end of
 * the output is missing it is one byte more: cp(1) and the like read so much and no more, and so
 * meet the error. Where nothing has come yet (`command` may be NULL) it is 1: sendfile(2) would not
 * ask for anything. */
off_t output_size(const struct command *command, const struct spool *spool);

/* Answers a READ of `length` bytes at *position of `spool` (the command's own), and moves the
 * position on. False, and no answer: nothing has come yet, and more may. At the end of a command
 * that was lost the answer is -ERR_COMMAND_LOST, of one that did not run why not, and where output
 * is missing -ERR_CUT. */
bool output_answer_read(struct command *command, struct spool *spool, uint64_t *position,
                        size_t length, struct request *rq);
