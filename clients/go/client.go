// Streams an answer: client ADDRESS PROMPT MAX_TOKENS.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	router "microserve/router/v1"
	types "microserve/types/v1"
)

const timeout = time.Minute

func main() {
	if len(os.Args) != 4 {
		usage()
	}
	count, err := strconv.ParseUint(os.Args[3], 10, 32)
	if err != nil {
		usage()
	}
	if err := run(os.Args[1], os.Args[2], uint32(count)); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %s\n", status.Code(err), status.Convert(err).Message())
		os.Exit(1)
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: client ADDRESS PROMPT MAX_TOKENS")
	os.Exit(2)
}

func run(address, prompt string, maxTokens uint32) error {
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	// No model is named: the fleet's only one is meant.
	stream, err := router.NewRouterServiceClient(connection).Generate(ctx, &router.GenerateRequest{
		Prompt:   &router.GenerateRequest_Text{Text: prompt},
		Sampling: &types.SamplingParams{MaxTokens: maxTokens},
	})
	if err != nil {
		return err
	}
	return show(stream)
}

func show(stream router.RouterService_GenerateClient) error {
	for {
		piece, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Print(piece.Text)
		if usage := piece.Usage; usage != nil {
			fmt.Fprintf(os.Stderr, "\n%d prompt tokens, %d output tokens\n", usage.PromptTokenCount, usage.OutputTokenCount)
		}
	}
}
