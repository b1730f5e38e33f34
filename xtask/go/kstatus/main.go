// What kstatus says of each object of a List: what Flux, kpt and Helm wait for.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

func main() {
	log.SetFlags(0)
	var list unstructured.UnstructuredList
	if err := json.NewDecoder(os.Stdin).Decode(&list); err != nil {
		log.Fatalf("read a List: %v", err)
	}
	for i := range list.Items {
		result, err := status.Compute(&list.Items[i])
		if err != nil {
			log.Fatalf("%s: %v", list.Items[i].GetName(), err)
		}
		fmt.Printf("%s %s\n", result.Status, result.Message)
	}
}
