#include "vmm/http.h"

#include <curl/curl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/list.h"
#include "util/unix_socket.h"

#define HTTP_WORDS_MAX 500 /* of a server's own words, in a sentence */
#define HTTP_AGAIN_MS 20   /* between tries to connect to a server that is slow to accept */

struct http_call {
    struct list link;
    const char *method, *path;
    char *body;   /* owned; NULL: none */
    uint64_t due; /* in the loop's time */
    unsigned timeout_ms;
    http_done *done;
    void *arg;
    struct buf answer;
    bool too_long; /* the answer */
};

struct http {
    uv_loop_t *loop;
    char *socket;
    pid_t peer;
    int held;                 /* what curl connects to (unix_hold()); -1: nothing */
    curl_socket_t fd;         /* curl's connection */
    int refused;              /* 0, or why there is none that is of any use */
    CURLM *multi;             /* NULL while nothing is under way */
    CURL *easy;               /* of the first call; NULL: it is not begun */
    struct curl_slist *lines; /* its header */
    struct list calls;
    uv_timer_t timer; /* what curl waits for, or the next call */
    unsigned handles; /* of the loop, not yet closed; the client is freed with the last */
    bool busy;        /* inside a callback: freeing waits */
    bool closed;      /* by the owner: no callbacks */
};

/* A socket that curl waits for. */
struct http_wait {
    uv_poll_t poll;
    struct http *http;
    curl_socket_t fd;
};

static void call_free(struct http_call *call) {
    list_remove(&call->link);
    free(call->body);
    buf_free(&call->answer);
    free(call);
}

static struct http_call *http_first(const struct http *http) {
    return LIST_OWNER(http->calls.next, struct http_call, link);
}

static void http_unref(struct http *http) {
    if (--http->handles)
        return;
    free(http->socket);
    free(http);
}

static void http_on_timer_closed(uv_handle_t *handle) {
    http_unref(handle->data);
}

static void http_on_wait_closed(uv_handle_t *handle) {
    struct http_wait *wait = handle->data;
    http_unref(wait->http);
    free(wait);
}

/* Drops what is under way, and all that curl holds. */
static void http_drop(struct http *http) {
    if (http->easy) {
        curl_multi_remove_handle(http->multi, http->easy);
        curl_easy_cleanup(http->easy);
    }
    if (http->multi)
        curl_multi_cleanup(http->multi);
    curl_slist_free_all(http->lines);
    if (http->held >= 0)
        close(http->held);
    http->held = -1;
    http->easy = NULL;
    http->multi = NULL;
    http->lines = NULL;
}

static void http_free(struct http *http) {
    http_drop(http);
    while (!list_is_empty(&http->calls))
        call_free(http_first(http));
    uv_close((uv_handle_t *)&http->timer, http_on_timer_closed);
}

void http_close(struct http *http) {
    if (!http || http->closed)
        return;
    http->closed = true;
    if (!http->busy)
        http_free(http);
}

/* ---- the answer ---- */

/* The server's words, without what would lead a terminal astray. */
static void words_append(struct buf *out, const char *text, size_t length) {
    size_t most = length < HTTP_WORDS_MAX ? length : HTTP_WORDS_MAX;
    for (size_t i = 0; i < most; i++) {
        unsigned char c = (unsigned char)text[i];
        buf_append_char(out, c < 0x20 || c == 0x7f ? ' ' : text[i]);
    }
}

/* Firecracker says {"fault_message": "…"}. Cloud Hypervisor says an array of strings, from the
 * whole to its cause; older ones say plain text. */
static void words_find(const json_t *json, const struct buf *answer, struct buf *out) {
    const json_t *fault = json_object_get(json, "fault_message");
    size_t i;
    json_t *item;
    if (json_is_string(fault)) {
        words_append(out, json_string_value(fault), json_string_length(fault));
    } else if (json_is_array(json)) {
        json_array_foreach(json, i, item) {
            if (!json_is_string(item) || out->len > HTTP_WORDS_MAX)
                continue;
            buf_append_str(out, out->len ? ": " : "");
            words_append(out, json_string_value(item), json_string_length(item));
        }
    } else if (answer->len) {
        words_append(out, answer->data, answer->len);
    }
}

/* Why curl has no answer, and which status that is. */
static int http_explain(const struct http_call *call, CURLcode result, struct buf *out) {
    switch (result) {
    case CURLE_OPERATION_TIMEDOUT:
        buf_printf(out, "no answer within %u ms", call->timeout_ms);
        return -ERR_TIMED_OUT;
    case CURLE_GOT_NOTHING:
    case CURLE_RECV_ERROR:
    case CURLE_SEND_ERROR:
    case CURLE_PARTIAL_FILE:
        buf_append_str(out, "the connection was closed before the answer was complete");
        return -ERR_UNREACHABLE;
    case CURLE_WRITE_ERROR:
        buf_printf(out, call->too_long ? "the answer has more than %d bytes" : "out of memory",
                   HTTP_ANSWER_MAX);
        return -ERR_IO;
    case CURLE_UNSUPPORTED_PROTOCOL:
    case CURLE_WEIRD_SERVER_REPLY:
        buf_append_str(out, "the answer is no HTTP");
        return -ERR_IO;
    default:
        buf_append_str(out, curl_easy_strerror(result));
        return -ERR_IO;
    }
}

/* Ends the first call. `why` is the sentence without its beginning. */
static void http_end(struct http *http, int status, const json_t *json, const struct buf *why,
                     const char *words) {
    struct http_call *call = http_first(http);
    cleanup_buf struct buf text = {0};
    buf_printf(&text, "%s %s: %s", call->method, call->path, why->data ? why->data : "");
    http_drop(http);
    list_remove(&call->link);
    if (call->done && !http->closed)
        call->done(call->arg, status, status < 0 ? NULL : json,
                   status == 0                  ? ""
                   : text.failed || why->failed ? "out of memory"
                                                : text.data,
                   words);
    call_free(call);
}

/* There is no connection for the first call. */
static void http_end_unconnected(struct http *http) {
    cleanup_buf struct buf why = {0};
    int status = http->refused;
    if (status == -ENOENT || status == -ECONNREFUSED)
        buf_printf(&why, "nobody listens on %s", http->socket);
    else
        buf_printf(&why, "%s cannot be connected to: %s", http->socket, unix_connect_error(status));
    http_end(http,
             status == -EAGAIN       ? -ERR_TIMED_OUT
             : status == -ERR_DENIED ? -ERR_DENIED
                                     : -ERR_UNREACHABLE,
             NULL, &why, "");
}

/* Ends the first call with what curl has of it. */
static void http_answer(struct http *http, CURLcode result) {
    struct http_call *call = http_first(http);
    cleanup_buf struct buf why = {0}, words = {0};
    json_t *json = NULL;
    long code = 0;
    int status = 0;
    if (http->refused < 0) {
        http_end_unconnected(http);
        return;
    }
    if (result == CURLE_OK) {
        curl_easy_getinfo(http->easy, CURLINFO_RESPONSE_CODE, &code);
        if (call->answer.len)
            json = json_loadb(call->answer.data, call->answer.len, JSON_DECODE_ANY, NULL);
        if (code < 200 || code > 299) {
            words_find(json, &call->answer, &words);
            buf_printf(&why, "it was refused with status %ld", code);
            status = -ERR_IO;
        } else if (call->answer.len && !json) {
            buf_append_str(&why, "the answer is no JSON");
            status = -ERR_IO;
        }
    } else {
        status = http_explain(call, result, &why);
    }
    http_end(http, status, json, &why, words.len && !words.failed ? words.data : "");
    json_decref(json);
}

static size_t http_on_data(char *data, size_t size, size_t count, void *arg) {
    struct http_call *call = arg;
    size_t length = size * count;
    if (call->answer.len + length > HTTP_ANSWER_MAX) {
        call->too_long = true;
        return 0;
    }
    buf_append(&call->answer, data, length);
    return call->answer.failed ? 0 : length;
}

/* ---- curl in the loop ---- */

static curl_socket_t http_on_open(void *arg, curlsocktype purpose, struct curl_sockaddr *address) {
    struct http *http = arg;
    (void)purpose;
    http->fd = socket(address->family, address->socktype | SOCK_CLOEXEC, address->protocol);
    return http->fd < 0 ? CURL_SOCKET_BAD : http->fd;
}

/* Before anything is said. */
static int http_on_connected(void *arg, char *peer, char *local, int peer_port, int local_port) {
    struct http *http = arg;
    (void)peer, (void)local, (void)peer_port, (void)local_port;
    http->refused = unix_check_peer(http->fd, http->peer);
    return http->refused < 0 ? CURL_PREREQFUNC_ABORT : CURL_PREREQFUNC_OK;
}

static void http_step(struct http *http, curl_socket_t fd, int events);

static void http_on_poll(uv_poll_t *poll, int status, int events) {
    struct http_wait *wait = poll->data;
    int flags = status < 0 ? CURL_CSELECT_ERR
                           : ((events & UV_READABLE) ? CURL_CSELECT_IN : 0) |
                                 ((events & UV_WRITABLE) ? CURL_CSELECT_OUT : 0);
    http_step(wait->http, wait->fd, flags);
}

static void http_on_timer(uv_timer_t *timer) {
    http_step(timer->data, CURL_SOCKET_TIMEOUT, 0);
}

static int http_on_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *socket_arg) {
    struct http *http = arg;
    struct http_wait *wait = socket_arg;
    (void)easy;
    if (what == CURL_POLL_REMOVE) {
        if (wait)
            uv_close((uv_handle_t *)&wait->poll, http_on_wait_closed);
        return 0;
    }
    if (!wait) {
        wait = calloc(1, sizeof *wait);
        if (!wait || uv_poll_init(http->loop, &wait->poll, fd) < 0) {
            free(wait);
            return -1;
        }
        wait->http = http;
        wait->fd = fd;
        wait->poll.data = wait;
        http->handles++;
        curl_multi_assign(http->multi, fd, wait);
    }
    int events = (what & CURL_POLL_IN ? UV_READABLE : 0) | (what & CURL_POLL_OUT ? UV_WRITABLE : 0);
    return uv_poll_start(&wait->poll, events, http_on_poll) < 0 ? -1 : 0;
}

static int http_on_timeout(CURLM *multi, long timeout_ms, void *arg) {
    struct http *http = arg;
    (void)multi;
    if (timeout_ms < 0)
        uv_timer_stop(&http->timer);
    else /* never in this turn: callers that answer a failure with a request would go on for ever */
        uv_timer_start(&http->timer, http_on_timer, timeout_ms ? (uint64_t)timeout_ms : 1, 0);
    return 0;
}

static void http_set_up(struct http *http, struct http_call *call, uint64_t left) {
    CURL *easy = http->easy;
    cleanup_buf struct buf url = {0};
    char held[32];
    snprintf(held, sizeof held, "/proc/self/fd/%d", http->held);
    buf_printf(&url, "http://localhost%s", call->path);
    /* Without "Expect", which asks for permission to send a body; curl's own choice of a type would
     * be that of a form. */
    http->lines = curl_slist_append(http->lines, "Accept: application/json");
    http->lines = curl_slist_append(http->lines, "Expect:");
    http->lines = curl_slist_append(http->lines, call->body ? "Content-Type: application/json"
                                                            : "Content-Type:");
    curl_easy_setopt(easy, CURLOPT_URL, url.data);
    curl_easy_setopt(easy, CURLOPT_UNIX_SOCKET_PATH, held);
    curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, http_on_open);
    curl_easy_setopt(easy, CURLOPT_OPENSOCKETDATA, http);
    curl_easy_setopt(easy, CURLOPT_PREREQFUNCTION, http_on_connected);
    curl_easy_setopt(easy, CURLOPT_PREREQDATA, http);
    curl_easy_setopt(easy, CURLOPT_PROXY, ""); /* whatever $http_proxy says */
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http");
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_FORBID_REUSE, 1L);
    curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, (long)left);
    curl_easy_setopt(easy, CURLOPT_HTTPHEADER, http->lines);
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, http_on_data);
    curl_easy_setopt(easy, CURLOPT_WRITEDATA, call);
    if (strcmp(call->method, "GET") != 0) {
        curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, call->method);
        curl_easy_setopt(easy, CURLOPT_POSTFIELDS, call->body ? call->body : "");
    }
    curl_multi_setopt(http->multi, CURLMOPT_SOCKETFUNCTION, http_on_socket);
    curl_multi_setopt(http->multi, CURLMOPT_SOCKETDATA, http);
    curl_multi_setopt(http->multi, CURLMOPT_TIMERFUNCTION, http_on_timeout);
    curl_multi_setopt(http->multi, CURLMOPT_TIMERDATA, http);
}

/* Begins the first call, if none is under way. */
static void http_begin(struct http *http) {
    while (!http->easy && !list_is_empty(&http->calls) && !http->closed) {
        struct http_call *call = http_first(http);
        uint64_t now = uv_now(http->loop);
        http->refused = unix_hold(http->socket, &http->held);
        if (http->refused < 0) {
            http_end_unconnected(http);
            continue;
        }
        http->multi = curl_multi_init();
        http->easy = curl_easy_init();
        if (http->multi && http->easy) {
            http_set_up(http, call, call->due > now ? call->due - now : 1);
            if (curl_multi_add_handle(http->multi, http->easy) == CURLM_OK)
                return;
        }
        curl_easy_cleanup(http->easy);
        http->easy = NULL;
        http_answer(http, CURLE_OUT_OF_MEMORY);
    }
}

/* Why curl was not connected, which it does not tell: what another try says. One that has come to
 * something now will again. */
static int http_probe(const struct http *http) {
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int status = fd < 0 ? -errno : unix_connect(fd, http->socket, http->peer);
    return status < 0 ? status : -EAGAIN;
}

/* The server has too many to accept: the first call waits a little, and is begun anew. */
static bool http_tries_again(struct http *http, CURLcode result) {
    if (result == CURLE_COULDNT_CONNECT)
        http->refused = http_probe(http);
    if (http->refused != -EAGAIN || http->closed ||
        http_first(http)->due < uv_now(http->loop) + 2 * HTTP_AGAIN_MS)
        return false;
    http_drop(http);
    uv_timer_start(&http->timer, http_on_timer, HTTP_AGAIN_MS, 0);
    return true;
}

/* Lets curl go on, and tells what is over. */
static void http_step(struct http *http, curl_socket_t fd, int events) {
    int running;
    http->busy = true;
    if (http->multi)
        curl_multi_socket_action(http->multi, fd, events, &running);
    CURLMsg *message = http->multi ? curl_multi_info_read(http->multi, &running) : NULL;
    bool over = message && message->msg == CURLMSG_DONE;
    bool again = over && http_tries_again(http, message->data.result);
    if (over && !again)
        http_answer(http, message->data.result);
    if (!again)
        http_begin(http);
    http->busy = false;
    if (http->closed)
        http_free(http);
}

/* ---- the client ---- */

int http_open(uv_loop_t *loop, const char *socket, struct http **ret_http) {
    static bool initialised;
    if (!initialised && curl_global_init(CURL_GLOBAL_NOTHING) != CURLE_OK)
        return -ERR_NO_MEMORY;
    initialised = true;
    struct http *http = calloc(1, sizeof *http);
    char *path = strdup(socket);
    if (!http || !path) {
        free(http);
        free(path);
        return -ERR_NO_MEMORY;
    }
    http->loop = loop;
    http->socket = path;
    http->handles = 1;
    http->held = -1;
    list_init(&http->calls);
    uv_timer_init(loop, &http->timer);
    http->timer.data = http;
    *ret_http = http;
    return 0;
}

void http_set_peer(struct http *http, pid_t peer) {
    http->peer = peer;
}

int http_request(struct http *http, const char *method, const char *path, json_t *body,
                 unsigned timeout_ms, http_done *done, void *arg) {
    struct http_call *call = calloc(1, sizeof *call);
    char *text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    bool failed = !call || (body && !text);
    json_decref(body);
    if (failed) {
        free(call);
        free(text);
        return -ERR_NO_MEMORY;
    }
    uv_update_time(
        http->loop); /* the deadline counts from now, whatever this turn has done before */
    *call = (struct http_call){
        .method = method,
        .path = path,
        .body = text,
        .due = uv_now(http->loop) + timeout_ms,
        .timeout_ms = timeout_ms,
        .done = done,
        .arg = arg,
    };
    list_init(&call->link);
    list_append(&http->calls, &call->link);
    /* Begun in the loop, as no callback may come from in here. */
    if (!http->busy && !http->easy)
        uv_timer_start(&http->timer, http_on_timer, 0, 0);
    return 0;
}
