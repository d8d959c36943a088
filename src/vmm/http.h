#pragma once

#include <jansson.h>
#include <sys/types.h>
#include <uv.h>

/* A client of an HTTP server on a UNIX socket, for VMMs with a REST interface. Only http.c includes
 * curl.
 *
 * Requests go out one at a time, in order, each on a connection of its own: between two of them
 * nothing is held. Each has a deadline from the moment it is given. What the server sends is not
 * trusted: an answer has HTTP_ANSWER_MAX bytes at most, and what is no JSON is an error.
 *
 * The creator owns the client until http_close(). Callbacks come from the loop, never from inside a
 * function of this header, and may call any of them. */

struct http;

#define HTTP_ANSWER_MAX (1024 * 1024)

/* The answer. `status` 0: the server has said yes (2xx), and `answer` is the borrowed JSON, NULL if
 * there was none. Else `why` is a sentence that begins with the request, and `words` what the
 * server has said to that, or "":
 * -ERR_UNREACHABLE: nobody listens there, or the connection was lost before the answer was here;
 * -ERR_TIMED_OUT: no answer, or it has not even taken the connection; -ERR_DENIED: it is another
 * who listens there; -ERR_IO: the server has said no, or something that cannot be understood. */
typedef void http_done(void *arg, int status, const json_t *answer, const char *why,
                       const char *words);

int http_open(uv_loop_t *loop, const char *socket, struct http **ret_http);

/* The process that has to listen there (util/unix_socket.h); 0, as at first: any. */
void http_set_peer(struct http *http, pid_t peer);

/* Gives a request. `method` and `path` are string constants. Takes over `body` (NULL: none). `done`
 * (NULL: the answer is dropped) is called exactly once if this returns 0, unless the client is
 * closed before. -ERR_NO_MEMORY: it is not called. */
int http_request(struct http *http, const char *method, const char *path, json_t *body,
                 unsigned timeout_ms, http_done *done, void *arg);

/* No callback comes after this. Frees the client, in a later turn of the loop. NULL is allowed. */
void http_close(struct http *http);
