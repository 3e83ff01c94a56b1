import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/** Requests of the JDK's HttpClient, which asks for HTTP/2 unless told otherwise; one line of output for each. */
public class Requests {
    private static String url;
    private static String body;
    private static String streamed;

    interface Work {
        String run() throws Exception;
    }

    public static void main(String[] arguments) {
        url = arguments[0];
        body = arguments[1];
        streamed = arguments[2];
        HttpClient standard = HttpClient.newHttpClient();
        HttpClient older = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        check("POST of a chat on a new connection", () -> post(standard));
        check("POST of a chat on the same connection", () -> post(standard));
        check("GET on a new connection", () -> get(HttpClient.newHttpClient()));
        check("GET on the same client", () -> get(standard));
        check("POST of a chat, streamed", () -> stream(standard));
        check("POST of a chat, streamed, on a new connection", () -> stream(HttpClient.newHttpClient()));
        check("POST of 4 chats at once", () -> concurrent(HttpClient.newHttpClient()));
        check("POST of a chat by HTTP/1.1", () -> post(older));
    }

    /** Prints the name and, after a tab, what went wrong. */
    private static void check(String name, Work work) {
        String error;
        try {
            error = work.run();
        } catch (Exception exception) {
            error = exception.toString();
        }
        System.out.println(name + "\t" + error.replaceAll("\\s+", " "));
    }

    private static HttpRequest chat(String json) {
        return HttpRequest.newBuilder(URI.create(url + "/v1/chat/completions"))
                .header("Content-Type", "application/json")
                .timeout(Duration.ofSeconds(120))
                .POST(HttpRequest.BodyPublishers.ofString(json))
                .build();
    }

    private static String wrong(int status, String text, String expected) {
        return status == 200 && text.contains(expected) ? "" : "status " + status + ": " + text;
    }

    private static String post(HttpClient client) throws Exception {
        HttpResponse<String> reply = client.send(chat(body), HttpResponse.BodyHandlers.ofString());
        return wrong(reply.statusCode(), reply.body(), "\"choices\"");
    }

    private static String get(HttpClient client) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url + "/v1/models")).build();
        HttpResponse<String> reply = client.send(request, HttpResponse.BodyHandlers.ofString());
        return wrong(reply.statusCode(), reply.body(), "\"data\"");
    }

    private static String stream(HttpClient client) throws Exception {
        HttpResponse<Stream<String>> reply = client.send(chat(streamed), HttpResponse.BodyHandlers.ofLines());
        return wrong(reply.statusCode(), reply.body().collect(Collectors.joining("\n")), "data: [DONE]");
    }

    private static String concurrent(HttpClient client) {
        List<CompletableFuture<String>> replies = Stream.generate(() -> chat(body)).limit(4)
                .map(request -> client.sendAsync(request, HttpResponse.BodyHandlers.ofString()))
                .map(reply -> reply.thenApply(r -> wrong(r.statusCode(), r.body(), "\"choices\"")))
                .collect(Collectors.toList());
        return replies.stream().map(CompletableFuture::join).collect(Collectors.joining());
    }
}
